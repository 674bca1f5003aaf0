"""The LightningModule under a plain Trainer, as from a notebook."""

import math

import lightning.pytorch as pl
import pytest
import torch
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.evaluation import TTTConfig, score_tokens
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.training.module import HymbaModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Recorder(pl.Callback):
    """Keeps what each optimizer step used."""

    def __init__(self) -> None:
        self.lr_scale, self.momentum, self.loss = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lr_scale.append(pl_module.run.lr_scale)
        self.loss.append(float(outputs["loss"]))
        muon = next(g for g in trainer.optimizers[0].param_groups if g["algorithm"] == "muon")
        self.momentum.append(muon["momentum"])


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    """A run of 40 steps: trainer, module, data, recorder."""
    module, recorder = tiny_module(average_window=1.0), Recorder()
    data = tiny_data(folder)
    trainer = tiny_trainer(tmp_path_factory.mktemp("run"), max_steps=40, callbacks=[recorder])
    trainer.fit(module, data)
    return trainer, module, data, recorder


def test_a_plain_trainer_has_the_schedule_and_the_average(fitted):
    trainer, module, _, recorder = fitted
    assert len(recorder.lr_scale) == 40
    assert recorder.lr_scale[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])  # a tenth of 40 steps
    assert recorder.lr_scale[4:9] == [1.0] * 5
    # Over the last 32 steps linearly to a tenth.
    assert recorder.lr_scale[8:] == pytest.approx([0.1 + 0.9 * left / 32 for left in range(32, 0, -1)])
    assert recorder.momentum[:6] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    average = next(c for c in trainer.callbacks if isinstance(c, WeightAverage))
    assert any(isinstance(c, WallClock) for c in trainer.callbacks)
    with average.raw_weights(module):
        raw = module.net.tok_emb.weight.detach().clone()
    assert not torch.equal(raw, module.net.tok_emb.weight)


def test_it_learns(fitted):
    _, _, _, recorder = fitted
    assert recorder.loss[-1] < 0.75 * recorder.loss[0]


def test_validation_scores_every_token_after_the_first_with_averaged_weights(fitted, folder):
    trainer, module, data, _ = fitted
    result = trainer.validate(module, data, verbose=False)[0]
    assert module.last_validation.n_tokens == 699
    tokens = data.val_stream()[:]
    assert module.last_validation.n_bytes == int(data.token_bytes.count(tokens[:-1].numpy(), tokens[1:].numpy()).sum())
    nats = 0.0
    with torch.no_grad():
        for first in range(0, 699, 64):
            piece = tokens[first : first + 65][None]
            nats += float(module.net(piece[:, :-1], piece[:, 1:], reduction="sum"))
    assert result["val/loss"] == pytest.approx(nats / 699, rel=1e-5)
    assert result["val/bpb"] == pytest.approx(nats / math.log(2) / module.last_validation.n_bytes, rel=1e-5)


def test_test_scores_the_stream_adapts_and_gives_the_weights_back(fitted):
    trainer, module, data, _ = fitted
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    plain = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    result = trainer.test(module, data, verbose=False)[0]
    assert module.test_score().n_tokens == 699
    assert len(module.testing.scores) == 4
    cold = score_tokens(module.net, data.val_stream()[:193], 1, seq_len=64, stride=64, batch_size=4)
    assert module.testing.scores[0].nats == pytest.approx(float(cold.sum()), rel=1e-6)
    assert module.testing.chunk.nats.numel() == 699 - 3 * 192
    assert module.testing.ttt.n_adapted == 4
    assert result["val_ttt/loss"] != pytest.approx(
        plain, rel=1e-7
    )  # chunks of 192 = 3 sequences: only adaptation differs
    for name, parameter in module.net.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_interrupted_test_gives_the_weights_back(folder, tmp_path):
    class Interrupt(pl.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                raise RuntimeError("interrupted")

    module = tiny_module(ttt=TTTConfig(lr=0.1))
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny_trainer(tmp_path, callbacks=[Interrupt()]).test(module, tiny_data(folder), verbose=False)
    assert module.testing.ttt.n_adapted == 2
    for name, parameter in module.net.named_parameters():
        assert torch.equal(parameter, before[name]), name


class EndsItsTests(HymbaModule):
    """Unfreezes after our setup, and has results to tell at a test's end."""

    def setup(self, stage):
        super().setup(stage)
        self.net.requires_grad_(True)

    def on_test_end(self):
        super().on_test_end()
        raise ZeroDivisionError("no results")


def test_a_subclass_ends_its_tests_only_at_their_end_and_may_unfreeze_itself(folder, tmp_path):
    class Interrupt(pl.Callback):
        def on_test_batch_start(self, *_):
            raise RuntimeError("interrupted")

    module = EndsItsTests(tiny_module().net.config, budget_seconds=None)
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny_trainer(tmp_path, callbacks=[Interrupt()]).test(module, tiny_data(folder), verbose=False)
    module.net.requires_grad_(False)
    tiny_trainer(tmp_path, max_steps=1, val_check_interval=0, limit_val_batches=0).fit(module, tiny_data(folder))


def test_what_cannot_be_trained_or_read_is_said(folder, tmp_path):
    module = tiny_module()
    with pytest.raises(TypeError, match="a batch holds a tensor of float32"):
        tiny_trainer(tmp_path).predict(module, torch.ones(2, 1, 9))
    module.net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would be trained: requires_grad is False for every parameter"):
        tiny_trainer(tmp_path).fit(module, tiny_data(folder))


def test_lengths_of_another_run_are_told_once_with_the_remedy(folder, tmp_path, caplog):
    module = tiny_module(optimizer={"warmdown_iters": 3000, "muon_momentum_warmup_steps": 500}, ema_decay=0.997)
    tiny_trainer(tmp_path, max_steps=4).fit(module, tiny_data(folder))
    told = [line for line in caplog.messages if "longer than this run" in line or "too long for this run" in line]
    assert [line.split()[0] for line in told] == [
        "optimizer.warmdown_iters",
        "optimizer.muon_momentum_warmup_steps",
        "ema_decay",
    ]
    assert "optimizer.warmdown_iters 3000 is longer than this run of about 4 steps" in told[0]


def test_a_budget_tells_such_lengths_once_its_steps_are_timed(folder, tmp_path, caplog):
    module = tiny_module(optimizer={"warmdown_iters": 3000}, budget_seconds=0.5)
    tiny_trainer(tmp_path, max_steps=-1, max_epochs=1).fit(module, tiny_data(folder))
    told = [line for line in caplog.messages if "longer than this run" in line]
    assert len(told) == 1
    assert "warmdown_iters 3000" in told[0]


def test_gradient_accumulation_equals_the_larger_batch(folder, tmp_path):
    weights = []
    for micro, accumulate in ((4, 1), (2, 2)):
        module = tiny_module()
        trainer = tiny_trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate)
        trainer.fit(module, tiny_data(folder, micro_batch_size=micro))
        assert trainer.global_step == 3
        weights.append(module.net.blocks[0].mlp.fc.weight.detach())
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 2e-3  # Newton–Schulz works in bfloat16


def test_the_reference_switches_act(folder, tmp_path):
    module = tiny_module(optimizer={"train_conv": False})
    start = module.net.blocks[0].attn.conv1d.weight.detach().clone()
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.fit(module, tiny_data(folder))
    ema = next(c for c in trainer.callbacks if isinstance(c, WeightAverage))
    with ema.raw_weights(module):
        assert torch.equal(module.net.blocks[0].attn.conv1d.weight, start)
    repaired = tiny_module()
    tiny_trainer(tmp_path, max_steps=3).fit(repaired, tiny_data(folder))
    assert not torch.equal(repaired.net.blocks[0].attn.conv1d.weight, start)


def test_another_vocabulary_or_document_start_is_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 512: set it to 1024"):
        tiny_trainer(tmp_path).fit(tiny_module(net={"vocab_size": 512}), tiny_data(folder))
    with pytest.raises(ValueError, match=r"is 512: set it to 1024 \(and model\.net\.bos_id to 1\)"):
        tiny_trainer(tmp_path).fit(tiny_module(net={"vocab_size": 512, "bos_id": 2}), tiny_data(folder))
    with pytest.raises(ValueError, match="bos_id is 2: set it to 1"):
        tiny_trainer(tmp_path).fit(tiny_module(net={"bos_id": 2}), tiny_data(folder))


def test_a_run_without_end_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="budget_seconds"):
        tiny_trainer(tmp_path, max_steps=-1, max_epochs=1).fit(tiny_module(), tiny_data(folder))


def test_a_checkpoint_with_settings_of_earlier_versions_still_loads(folder, tmp_path):
    module, trainer = tiny_module(), tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(module, tiny_data(folder))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    saved["hyper_parameters"] |= {"qat_start": 0.85, "runtime": {"qat_bits": 4, "loss_backend": "torch"}}
    torch.save(saved, tmp_path / "old.ckpt")
    loaded = HymbaModule.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert loaded.net.runtime == RuntimeConfig(loss_backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), module.net.parameters(), strict=True))


def test_a_checkpoint_of_another_network_is_refused_with_the_fields(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(tiny_module(), tiny_data(folder))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="window: checkpoint 16, config 32"):
        tiny_trainer(tmp_path).validate(
            tiny_module(net={"window": 32}), tiny_data(folder), ckpt_path=tmp_path / "a.ckpt"
        )


def test_each_of_two_modules_of_one_trainer_has_its_own_scores(folder, tmp_path):
    trainer, data = tiny_trainer(tmp_path, max_steps=8), tiny_data(folder)
    trained, fresh = tiny_module(ttt=TTTConfig(epochs=0)), tiny_module(ttt=TTTConfig(epochs=0))
    trainer.fit(trained, data)
    for module in (trained, fresh):
        assert module is trained or module.last_validation is None
        trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
    assert trained.last_validation.bpb < fresh.last_validation.bpb - 0.05
    assert trained.test_score().bpb == pytest.approx(trained.last_validation.bpb)
    assert fresh.test_score().bpb == pytest.approx(fresh.last_validation.bpb)
