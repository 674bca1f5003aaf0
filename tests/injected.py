"""Faults for runs that tests start in processes of their own; each is called in the child before the command runs."""

from __future__ import annotations

import functools
import os
import resource
import signal
import time
from pathlib import Path

from hymba_lightning.callbacks.rank_watch import RankWatch
from hymba_lightning.data.shards import Shard
from hymba_lightning.run.finish import _Ending
from hymba_lightning.training import module
from hymba_lightning.training.module import HymbaModule


def _at_step(step: int, fault: object) -> None:
    """Calls fault(loss) on the loss of the first micro-batch after `step` optimizer steps; uses what it returns."""
    original = HymbaModule.training_step

    def training_step(self: HymbaModule, batch: object, batch_idx: int) -> object:
        loss = original(self, batch, batch_idx)
        return fault(loss) if self.trainer.global_step == step else loss

    HymbaModule.training_step = training_step


def nan_on_the_last_rank(rank: int) -> None:
    """The loss of the eighth step is NaN on the last of the ranks."""
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        _at_step(7, lambda loss: loss * float("nan"))


def slow_steps(rank: int) -> None:
    """Steps take long enough to be interrupted in."""
    original = HymbaModule.training_step

    def training_step(self: HymbaModule, batch: object, batch_idx: int) -> object:
        time.sleep(0.1)
        return original(self, batch, batch_idx)

    HymbaModule.training_step = training_step


def rank_1_hangs(rank: int) -> None:
    """Rank 1 never comes back from its fifth step; a dead peer's rank has half a second to end by itself."""
    RankWatch.__init__ = functools.partialmethod(RankWatch.__init__, grace_seconds=0.5)
    if rank == 1:
        _at_step(4, lambda loss: time.sleep(1000))


def rank_1_stands_still(rank: int) -> None:
    """Rank 1 is stopped in its fifth step, as by SIGSTOP, and the others count it as dead after 5 s of that."""
    RankWatch.__init__ = functools.partialmethod(RankWatch.__init__, grace_seconds=0.5, still_seconds=5.0)
    if rank == 1:
        _at_step(4, lambda loss: os.kill(os.getpid(), signal.SIGSTOP))


def rank_1_is_killed_opening_data(rank: int) -> None:
    """Rank 1 is gone before any callback is set up; rank 0 opens for long."""
    from hymba_lightning.data.datamodule import HymbaDataModule

    RankWatch.__init__ = functools.partialmethod(RankWatch.__init__, grace_seconds=0.5)
    original = HymbaDataModule.setup

    def setup(self: HymbaDataModule, stage: str) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3.0)
        original(self, stage)

    HymbaDataModule.setup = setup


def rank_1_gets_a_signal_in_the_warmup(rank: int) -> None:
    """Where ranks do not agree on signals: only one is told, and the others would wait for it."""
    from hymba_lightning.callbacks.compile_warmup import CompileWarmup

    original = CompileWarmup._run_step

    def run_step(*args: object) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(*args)

    CompileWarmup._run_step = staticmethod(run_step)


def error_on_rank_1(rank: int) -> None:
    """Rank 1 fails with an exception in its fifth step."""

    def fail(loss: object) -> None:
        raise ValueError("the cooling failed")

    if rank == 1:
        _at_step(4, fail)


def shard_vanishes(rank: int) -> None:
    """The training shard is gone when the run has opened it."""
    _at_open(lambda path: path.unlink())


def shard_shrinks(rank: int) -> None:
    """The training shard loses its end when the run has opened it."""
    _at_open(lambda path: os.truncate(path, path.stat().st_size // 2))


def _at_open(damage: object) -> None:
    original = Shard.__init__

    def init(self: Shard, path: object, vocab_size: int | None = None) -> None:
        original(self, path, vocab_size)
        if "_train_" in Path(path).name:
            damage(Path(path))

    Shard.__init__ = init


def full_disk(rank: int) -> None:
    """No file can grow over 40 kB: what a full disk does to a writer, for this process alone."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def prepare_saves_often(rank: int) -> None:
    """`hymba prepare` saves its progress after every document, and is slow enough to be interrupted."""
    from hymba_lightning.data import corpus

    original = corpus.split_rank

    def slow(document: object, seed: int) -> float:
        time.sleep(0.005)
        return original(document, seed)

    corpus.SAVE_SECONDS, corpus.split_rank = 0.0, slow


def own_folder(rank: int) -> None:
    """A disk of its own for every node: relative paths lie in node-<n> of the folder named by the environment."""
    os.chdir(Path(os.environ["TEST_NODES"], f"node-{rank}"))


def _waits_in(owner: type, method: str) -> None:
    """Calls of a method say so and then take long; what they did before comes first."""
    original = getattr(owner, method)

    def waiting(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        os.write(2, b"waiting here\n")
        for _ in range(600):
            time.sleep(0.1)
        return result

    setattr(owner, method, staticmethod(waiting) if isinstance(vars(owner)[method], staticmethod) else waiting)


def waits_in_setup(rank: int) -> None:
    """Before training: when the data is opened."""
    from hymba_lightning.data.datamodule import HymbaDataModule

    _waits_in(HymbaDataModule, "setup")


def waits_in_warmup(rank: int) -> None:
    """In the steps that are undone."""
    from hymba_lightning.callbacks.compile_warmup import CompileWarmup

    _waits_in(CompileWarmup, "_run_step")


def waits_in_the_finish(rank: int) -> None:
    """After training, when weights are scored."""

    _waits_in(_Ending, "score")


def waits_in_the_test(rank: int) -> None:
    """After the first chunk."""
    _waits_in(HymbaModule, "test_step")


def slow_validation(rank: int) -> None:
    """Each batch of a validation takes long enough to be interrupted in."""
    original = HymbaModule.validation_step

    def validation_step(self: HymbaModule, batch: object, batch_idx: int) -> object:
        if rank == 0:
            os.write(2, b"waiting here\n")
        time.sleep(1.0)
        return original(self, batch, batch_idx)

    HymbaModule.validation_step = validation_step


def a_fault_in_the_program(rank: int) -> None:
    """A conversion inside the package fails, which is nobody's bad input."""

    def fail(loss: object) -> None:
        raise ZeroDivisionError("the cooling failed")

    _at_step(2, fail)


def buffered_gradients(rank: int) -> None:
    """Gradients are made in one buffer, as on a GPU; nothing is recorded."""
    module.uses_cuda_graph = lambda *_: True
