"""Processes that share a device train on it one at a time; meanwhile the others import and compile, or, where no clock
ends the runs, score and quantize."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from filelock import FileLock


class DeviceTurn(pl.Callback):
    """Holds a lock file from before the training clock starts until the last step of a run that no clock ends, which a
    busy neighbour makes no different, or until one that has a budget has been scored and exported too.

    Stands before the clock among the callbacks, so that waiting costs no budget; what the compile warm-up runs on the
    device comes before, and is too short to disturb another's clock much.

    Args:
        path: The device's lock file.
    """

    def __init__(self, path: str) -> None:
        self._lock = FileLock(path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._lock.is_locked:
            self._lock.acquire()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if getattr(pl_module, "budget_seconds", None) is None:
            self._lock.release()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lock.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._lock.release()
