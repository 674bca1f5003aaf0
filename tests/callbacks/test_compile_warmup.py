"""A run with warm-up steps equals the run without, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_lightning import (
    FakeTime,
    StopAt,
    TimedModule,
    TinyData,
    TinyModule,
    assert_same,
    make_batch,
    make_trainer,
    run_ranks,
)

from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.compile_warmup import CompileWarmup
from hymba_lightning.callbacks.wall_clock import WallClock


class Watched(TinyModule):
    """Draws from every generator while training, and keeps what it sees."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.batches, self.warmup_calls, self.draws, self.warmup_weights = [], 0, [], []

    def training_step(self, batch, batch_idx):
        draws = (random.random(), float(np.random.rand()))
        if self.warming_up:
            self.warmup_calls += 1
            self.warmup_weights.append(self.net.tok_emb.weight.detach().clone())
        else:
            self.batches.append(batch.clone())
            self.draws.append(draws)
        return super().training_step(batch, batch_idx)


def run(folder, warmup_steps, ckpt=None, data=None, **options):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    module, ema, warmup = Watched(), WeightAverage(decay=0.9), CompileWarmup(warmup_steps)
    trainer = make_trainer(folder, [WallClock(), ema, warmup], **({"max_steps": 5} | options))
    trainer.fit(module, datamodule=data or TinyData(), ckpt_path=ckpt)
    optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
    state = {f"optimizer.{i}.{k}": v for i, s in optimizer["state"].items() for k, v in s.items()}
    state |= {f"average.{n}": w for n, w in module.weights().items()}
    with ema.raw_weights(module):
        state |= {f"raw.{n}": w for n, w in module.weights().items()}
    return trainer, module, state, optimizer["param_groups"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_left_of_the_warm_up(tmp_path, accumulate):
    _, without, expected, groups = run(tmp_path, 0, accumulate_grad_batches=accumulate)
    trainer, module, state, found_groups = run(tmp_path, 3, accumulate_grad_batches=accumulate)
    assert module.warmup_calls == 3 * accumulate
    assert_same(expected, state)
    assert found_groups == groups
    assert module.losses == without.losses
    assert module.draws == without.draws
    assert trainer.global_step == 5
    for index, batch in enumerate(module.batches):
        assert torch.equal(batch, make_batch(index))
    assert not module.warming_up
    assert "log" not in vars(module)


def test_a_resumed_run_warms_up_too(tmp_path):
    trainer, *_ = run(tmp_path, 0, max_steps=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, _, expected, _ = run(tmp_path, 0, ckpt=tmp_path / "x.ckpt")
    _, module, state, _ = run(tmp_path, 2, ckpt=tmp_path / "x.ckpt")
    assert module.warmup_calls == 2
    assert_same(expected, state)


def test_warm_up_steps_really_train_and_cost_no_budget(tmp_path):
    seen = []

    class Spy(TimedModule):
        def training_step(self, batch, batch_idx):
            if self.warming_up:
                seen.append(self.net.tok_emb.weight.detach().clone())
            return super().training_step(batch, batch_idx)

    fake_time = FakeTime()
    module, clock = Spy(fake_time, [50.0, 50.0, 50.0, 1.0]), WallClock(4.0, margin=1.0, time_fn=fake_time)
    trainer = make_trainer(tmp_path, [clock, CompileWarmup(3)])
    trainer.fit(module, datamodule=TinyData())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert trainer.global_step == 4
    assert clock.elapsed() == pytest.approx(4.0)


def test_gradients_are_none_when_training_starts(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert all(p.grad is None for p in pl_module.parameters())
            self.looked = True

    look = Look()
    trainer = make_trainer(tmp_path, [CompileWarmup(2), look, StopAt(1)])
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert look.looked


def test_without_a_datamodule_it_warns_and_trains(tmp_path):
    trainer = make_trainer(tmp_path, [CompileWarmup(2)], max_steps=1)
    with pytest.warns(UserWarning, match=r"train_batch\(i\)"):
        trainer.fit(TinyModule(), TinyData().train_dataloader())
    assert trainer.global_step == 1


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="compile_warmup_steps is -1"):
        CompileWarmup(-1)


class RankData(TinyData):
    """Other batches on every rank."""

    def train_batch(self, index):
        return make_batch(2 * index + self.trainer.global_rank)


def _with_and_without(rank, folder):
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    _, _, expected, _ = run(folder, 0, **options)
    _, module, state, _ = run(folder, 2, data=RankData(), **options)
    assert module.warmup_calls == 4
    assert_same(expected, state)
    torch.save((state, module.warmup_weights), f"{folder}/{rank}.pt")


@pytest.mark.ddp
def test_two_ranks_warm_up_together(tmp_path):
    run_ranks(_with_and_without, str(tmp_path))
    (first, first_weights), (second, second_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    # Also while warming up: gradients went through DDP.
    for a, b in zip(first_weights, second_weights, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first_weights[0], first_weights[-1])
