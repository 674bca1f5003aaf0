"""Turns on a device: the lock is held from before the clock starts to the end of training or of the fit, not after a
failure."""

import pytest
from filelock import FileLock, Timeout
from tiny_lightning import TinyData, TinyModule, make_trainer

from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.studies.turn import DeviceTurn


class Probe(WallClock):
    """Notes whether the lock was held when the clock started, and when training ended."""

    def __init__(self, path):
        super().__init__()
        self.path, self.held = path, []

    def note(self):
        try:
            FileLock(self.path).acquire(timeout=0)
            self.held.append(False)
        except Timeout:
            self.held.append(True)

    def on_train_start(self, trainer, pl_module):
        self.note()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, *args):
        if not self.watch.started:
            self.note()
        super().on_train_batch_start(*args)

    def on_train_end(self, *args):
        self.note()
        super().on_train_end(*args)


def free(path):
    FileLock(path).acquire(timeout=0).lock.release()


@pytest.mark.parametrize(("budget", "held_after_training"), [(None, False), (600.0, True)])
def test_the_device_is_held_while_the_clock_runs(tmp_path, budget, held_after_training):
    path = str(tmp_path / "device.lock")
    probe, module = Probe(path), TinyModule()
    module.budget_seconds = budget
    make_trainer(tmp_path, max_steps=2, callbacks=[DeviceTurn(path), probe]).fit(module, TinyData())
    assert probe.held == [False, True, held_after_training]
    free(path)


def test_a_run_that_fails_gives_the_device_back(tmp_path):
    path = str(tmp_path / "device.lock")

    class Fails(Probe):
        def on_train_batch_end(self, *args):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, max_steps=2, callbacks=[DeviceTurn(path), Fails(path)]).fit(TinyModule(), TinyData())
    free(path)
