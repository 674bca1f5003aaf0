"""The first steps and the whole of short runs with the defaults: no rise of the loss, and the same after a resume."""

import lightning.pytorch as pl
import numpy as np
import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data
from tiny_lightning import FakeTime, StopAt, TimedModule, TinyData, make_trainer

from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.training.optim import OptimizerConfig


class Losses(pl.Callback):
    """Loss of each optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


class Rates(pl.Callback):
    """Learning-rate factor and momentum of each optimizer step."""

    def __init__(self):
        self.values = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        muon = next(group for group in optimizer.param_groups if group["algorithm"] == "muon")
        self.values.append((muon["lr"] / muon["base_lr"], muon["momentum"]))


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Texts of 200 tokens, half of them from all the vocabulary by Zipf's law, half from 60 ids of the text's own."""
    folder = write_data(tmp_path_factory.mktemp("topics"))
    random = np.random.default_rng(0)
    texts = []
    for _ in range(200):
        common = np.minimum(random.zipf(1.3, 100) - 1, 999)
        own = random.choice(random.choice(1000, 60, replace=False), 100)
        texts.append(random.permutation(np.concatenate([common, own])) + 3)
    write_shard(folder / "tiny_train_000000.bin", np.concatenate(texts).astype(np.uint16))
    return folder


@pytest.mark.parametrize("steps", [50, 60, 600])
def test_the_loss_does_not_rise_in_the_first_steps(topics, tmp_path, steps):
    losses = Losses()
    module = tiny_module(net={"d_model": 128, "n_heads": 4, "n_kv_heads": 2})
    trainer = tiny_trainer(tmp_path, max_steps=steps, callbacks=[losses, StopAt(20)])
    trainer.fit(module, tiny_data(topics, seq_len=256))
    assert len(losses.values) == 20
    assert max(losses.values) < losses.values[0] + 0.2  # with the reference's rates and no warm-up it goes to 9.7
    assert np.mean(losses.values[-5:]) < losses.values[0] - 0.2


@pytest.mark.parametrize("limit", ["budget", "steps"])
def test_a_resumed_run_has_the_same_schedule(tmp_path, limit):
    def run(ckpt_path=None, stop=None):
        fake_time, rates = FakeTime(), Rates()
        clock = WallClock(20.5 if limit == "budget" else None, margin=1.0, time_fn=fake_time)
        trainer = make_trainer(
            tmp_path,
            [clock, rates, *([StopAt(stop)] if stop else [])],
            **({"max_steps": 20} if limit == "steps" else {}),
        )
        trainer.fit(TimedModule(fake_time, [1.0], OptimizerConfig()), datamodule=TinyData(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return rates.values

    whole = run()
    assert len(whole) == 20
    assert len({rate for rate, _ in whole}) > 15
    first = run(stop=8)
    resumed = first + run(ckpt_path=tmp_path / "x.ckpt")
    np.testing.assert_allclose(resumed, whole, rtol=1e-9)
