"""Checkpoints to resume from: exact, whole or absent, free of charge, on signals too."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from tiny_lightning import FakeTime, TimedModule, TinyData, TinyModule, assert_same, make_trainer, run_ranks

import hymba_lightning.callbacks.checkpoint as checkpoint_module
import hymba_lightning.files as files
from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.checkpoint import CheckpointWriteError, TrainingCheckpoint
from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.claim import LOCK
from hymba_lightning.signals import Stopped


class Kill(Callback):
    """Does something in the middle of an optimizer step."""

    def __init__(self, batch_idx, action):
        self.batch_idx, self.action = batch_idx, action

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.batch_idx == self.batch_idx:
            self.action()


def crash():
    raise RuntimeError("pulled the plug")


def run(folder, *, steps=6, resume=False, every_n_steps=None, callbacks=(), seed=3, **options):
    torch.manual_seed(seed)
    module, ema = TinyModule(), WeightAverage(decay=0.9)
    save = TrainingCheckpoint(str(folder), every_n_seconds=None, every_n_steps=every_n_steps)
    trainer = make_trainer(folder, [WallClock(), ema, save, *callbacks], max_steps=steps, **options)
    trainer.fit(module, datamodule=TinyData(), ckpt_path=Path(folder) / "last.ckpt" if resume else None)
    with ema.raw_weights(module):
        raw = module.weights()
    optimizer = trainer.optimizers[0].state_dict()["state"]
    state = {f"{i}.{k}": v for i, s in optimizer.items() for k, v in s.items()}
    return trainer, {**{f"raw.{n}": w for n, w in raw.items()}, **module.weights(), **state}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_crashed_run_goes_on_exactly(tmp_path, accumulate):
    _, expected = run(tmp_path / "whole", accumulate_grad_batches=accumulate)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path, every_n_steps=3, callbacks=[Kill(4 * accumulate, crash)], accumulate_grad_batches=accumulate)
    # Another seed: dropout masks come from the checkpoint.
    trainer, state = run(tmp_path, resume=True, seed=4, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 6
    assert_same(expected, state)


def test_the_random_state_matters_here(tmp_path):
    _, first = run(tmp_path / "a", seed=3)
    _, second = run(tmp_path / "b", seed=4)
    assert not torch.equal(first["raw.tok_emb.weight"], second["raw.tok_emb.weight"])


def test_a_finished_run_can_be_given_more_steps(tmp_path):
    # Ended as the budget ends it, after which the schedule of the longer run would have been the same.
    class Budget(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 3

    _, expected = run(tmp_path / "whole", max_epochs=1)
    trainer, _ = run(tmp_path, callbacks=[Budget()], max_epochs=1, limit_val_batches=1)
    assert trainer.global_step == 3
    trainer, state = run(tmp_path, resume=True, max_epochs=1)
    assert trainer.global_step == 6
    assert_same(expected, state)


def test_checkpoints_load_without_executing_anything(tmp_path):
    run(tmp_path, steps=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert "random_states" in saved["callbacks"]["TrainingCheckpoint"]
    assert {p.name for p in tmp_path.iterdir()} - {LOCK} == {"last.ckpt"}


class FullDisk:
    """Stands in for a file: half of the bytes fit."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, steps=2)
    good = (tmp_path / "last.ckpt").read_bytes()
    real = os.fdopen
    monkeypatch.setattr(files.os, "fdopen", lambda handle, mode: FullDisk(real(handle, mode)))
    module = TinyModule()
    save = TrainingCheckpoint(str(tmp_path), every_n_seconds=None, every_n_steps=1)
    trainer = make_trainer(tmp_path, [WallClock(), save], max_steps=4)
    with (
        pytest.warns(UserWarning, match="step 3 not written: No space left.*; free some space"),
        pytest.raises(CheckpointWriteError, match=r"last\.ckpt of step 4"),
    ):
        trainer.fit(module, datamodule=TinyData(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4  # training went on after the failed write
    assert (tmp_path / "last.ckpt").read_bytes() == good
    assert {p.name for p in tmp_path.iterdir()} - {LOCK} == {"last.ckpt"}


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path):
    def poison():
        module.net.tok_emb.weight.data[3, 2] = float("nan")

    module = TinyModule()
    trainer = make_trainer(
        tmp_path,
        [TrainingCheckpoint(str(tmp_path), every_n_steps=1, every_n_seconds=None), Kill(2, poison)],
        max_steps=4,
    )
    with (
        pytest.warns(UserWarning, match=r"of step 3 not written: the weights are not finite \(net\.tok_emb\.weight"),
        pytest.raises(CheckpointWriteError, match="step 4 not written"),
    ):
        trainer.fit(module, datamodule=TinyData())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_an_interval_of_training_seconds_and_writing_costs_none(tmp_path, monkeypatch):
    fake_time, saved_at = FakeTime(), []
    real = checkpoint_module.write_checkpoint

    def slow_write(path, checkpoint):
        saved_at.append((checkpoint["global_step"], fake_time.now))
        fake_time.advance(1000.0)
        real(path, checkpoint)

    monkeypatch.setattr(checkpoint_module, "write_checkpoint", slow_write)
    clock = WallClock(10.0, margin=1.0, time_fn=fake_time)
    save = TrainingCheckpoint(str(tmp_path), every_n_seconds=4.0)
    trainer = make_trainer(tmp_path, [save, clock])
    trainer.fit(TimedModule(fake_time, [1.0]), datamodule=TinyData())
    assert saved_at == [(4, 4.0), (8, 1008.0), (10, 2010.0)]
    assert clock.elapsed() == pytest.approx(10.0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["WallClock"]["elapsed"] == 10.0


def test_what_a_killed_writer_left_is_cleaned_up(tmp_path):
    (tmp_path / ".last.ckpt.a1b2").write_bytes(b"half")
    run(tmp_path, steps=1)
    assert {p.name for p in tmp_path.iterdir()} - {LOCK} == {"last.ckpt"}


def test_an_exception_does_not_replace_the_good_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path, every_n_steps=2, callbacks=[Kill(3, crash)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_with_everything_saved(tmp_path, signum):
    before = signal.getsignal(signum)
    _, expected = run(tmp_path / "whole", accumulate_grad_batches=2)
    send = Kill(4, lambda: os.kill(os.getpid(), signum))  # first micro-batch of the third step
    with pytest.raises(Stopped) as raised:
        run(tmp_path, callbacks=[send], accumulate_grad_batches=2)
    assert raised.value.code == 128 + signum
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(signum) == before
    _, state = run(tmp_path, resume=True, seed=5, accumulate_grad_batches=2)
    assert_same(expected, state)


def test_after_training_signals_are_the_users_again(tmp_path):
    class Late(Checkpoint):  # checkpoint callbacks come last, in the order given
        def on_train_end(self, trainer, pl_module):
            self.seen = signal.getsignal(signal.SIGINT)

    before, late = signal.getsignal(signal.SIGINT), Late()
    run(tmp_path, steps=1, callbacks=[late])
    assert late.seen == before


def test_lightnings_broadcast_before_every_batch_is_off_while_the_clock_carries_signals(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, trainer, *args):
            self.inside = "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)

    look = Look()
    trainer, _ = run(tmp_path, steps=1, callbacks=[look])
    assert look.inside
    assert "_broadcast_sigterm_tensor" not in vars(trainer.fit_loop.epoch_loop)
    # Red when Lightning renames it: the wait for the GPU would silently be back.
    assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        run(tmp_path, every_n_steps=1, callbacks=[Kill(2, twice)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_an_interval_in_seconds_needs_a_clock(tmp_path):
    trainer = make_trainer(tmp_path, [TrainingCheckpoint(str(tmp_path), every_n_seconds=1.0)], max_steps=1)
    with pytest.raises(ValueError, match="needs a WallClock"):
        trainer.fit(TinyModule(), datamodule=TinyData())


@pytest.mark.parametrize("field", ["every_n_seconds", "every_n_steps"])
def test_bad_intervals_are_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        TrainingCheckpoint(**{field: 0})


def _interrupted_on_two_ranks(rank, folder):
    options = {"devices": 2, "strategy": "ddp"}
    _, expected = run(f"{folder}/whole", **options)
    # Only rank 1 gets the signal.
    send = Kill(2, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(folder, callbacks=[send], **options)
    except Stopped:
        pass
    else:
        raise AssertionError("the run went on")
    trainer, state = run(folder, resume=True, seed=9, **options)
    assert trainer.global_step == 6
    assert_same(expected, state)
    torch.save(state, f"{folder}/{rank}.pt")


@pytest.mark.ddp
def test_a_signal_to_one_rank_saves_and_ends_both(tmp_path):
    run_ranks(_interrupted_on_two_ranks, str(tmp_path))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    assert_same(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
