"""Checkpoints to resume from: whole or absent, never at the budget's cost, always between two optimizer steps."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hymba_lightning import signals
from hymba_lightning.callbacks.owner import FolderOwner, settle
from hymba_lightning.callbacks.random_state import random_states, restore_random_states, seed_in_use
from hymba_lightning.checkpoints import write_checkpoint
from hymba_lightning.errors import refused
from hymba_lightning.run.run import Run, require_clock
from hymba_lightning.trainer_internals import dump_checkpoint, is_ending, is_trial, signals_not_broadcast


class CheckpointWriteError(OSError):
    """The last checkpoint of a run could not be written."""


class TrainingCheckpoint(FolderOwner, ModelCheckpoint):
    """Keeps one file, `last.ckpt`, from which `fit` goes on exactly.

    It is written at an interval, after the last step, and on SIGINT, SIGTERM or SIGHUP, which end the run after the
    step in progress, or after the batch of a validation, on all ranks. Writing stops the training clock. The file is
    replaced in one move, so that a crash or a full disk leaves the one before it whole, and weights with NaN or
    infinities never replace it; a failed write in the middle of training is a warning, the last one an error.

    Holds what Lightning's checkpoints lack: the state of the random generators. It is rank 0's, which every rank takes
    over on resume: with one seed for all ranks, as Lightning sets it, and equal work their states are equal. Another
    seed given on resume has nothing left to do, and is told.

    Args:
        dirpath: Folder of last.ckpt; null for checkpoints/ in the run's folder.
        every_n_seconds: Training seconds between two checkpoints; null for none. Needs a WallClock.
        every_n_steps: Optimizer steps between two checkpoints; null for none.
        on_signal: Save and end on SIGINT, SIGTERM and SIGHUP. Needs a WallClock, without which signals end the run
            without saving.

    Raises:
        ValueError: an interval is not positive.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_seconds: float | None = 300.0,
        every_n_steps: int | None = None,
        on_signal: bool = True,
    ) -> None:
        if every_n_seconds is not None and not every_n_seconds > 0:
            raise ValueError(f"checkpoint.every_n_seconds is {every_n_seconds}; it must be positive, or null for none")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be 1 or more, or null for none")
        # The interval only tells the base class not to save at the end of an epoch; this class decides by itself.
        super().__init__(
            dirpath=None if dirpath is None else os.path.expanduser(dirpath),
            save_last=True,
            save_top_k=0,
            train_time_interval=timedelta(days=365),
            enable_version_counter=False,
        )
        self.every_n_seconds = every_n_seconds
        self.every_n_steps = every_n_steps
        self.on_signal = on_signal
        self._saved_at = 0.0
        self._seen_step = 0
        self._restored_randomness: dict[str, Any] | None = None
        self._seed: int | None = None
        self._restore_signals: Callable[[], None] | None = None
        self._quiet: AbstractContextManager[None] | None = None

    @property
    def state_key(self) -> str:
        """The callback's name in a checkpoint. The intervals are not in it, so that a resumed run may change them."""
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: an interval in seconds, but no clock among the callbacks.
        """
        run = Run.of(trainer)
        if self.dirpath is None:
            self.dirpath = str(run.folder_of(trainer).checkpoint.parent)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.every_n_seconds is not None and run.clock is None:
            raise ValueError("checkpoint.every_n_seconds needs a WallClock callback; add one, or use every_n_steps")
        self._last_global_step_saved = -1
        if trainer.is_global_zero:
            for leftover in Path(self.dirpath).glob(f".{self._path.name}.*"):
                leftover.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Run.of(trainer)
        clock = run.clock
        run.before_end.append(partial(self._end_training, trainer))
        self._seen_step = trainer.global_step
        self._saved_at = 0.0 if clock is None else clock.elapsed()
        seed = seed_in_use()
        if self._restored_randomness is not None:
            # Only now: loaders, sanity checks and warm-up steps have drawn their numbers.
            restore_random_states(self._restored_randomness)
            self._restored_randomness = None
            if None not in (seed, self._seed) and seed != self._seed:
                rank_zero_warn(
                    f"seed_everything {seed} does nothing: this run was begun with {self._seed}, and weights and "
                    "random numbers go on from the checkpoint"
                )
        else:
            self._seed = seed
        run.seed = self._seed
        if self.on_signal and clock is not None:
            self._restore_signals = signals.divert(clock.request_stop)
            # The ranks agree on signals through the clock. Lightning's own broadcast, for which every batch of a DDP
            # run waits on the GPU, has nothing left to tell.
            self._quiet = signals_not_broadcast(trainer)
            self._quiet.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """
        Raises:
            Stopped: a signal asked for it, and the state is saved.
        """
        if trainer.global_step == self._seen_step:
            return
        settle(trainer)
        self._seen_step = trainer.global_step
        clock = Run.of(trainer).clock
        code = 0 if clock is None else clock.stop_code
        # The end of training is saved here, not in on_train_end: there Lightning counts the epoch as finished, and a
        # resumed run with a larger budget would have nothing left to do.
        if is_ending(trainer) or self._due(trainer):
            self._save(trainer, must_succeed=bool(code))
        if code in signals.HANDLED:
            raise signals.Stopped(code)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """
        Raises:
            Stopped: as in `on_train_batch_end`; a validation in the middle of training need not be waited for.
        """
        if self._restore_signals is None:
            return
        code = require_clock(Run.of(trainer)).agree_on_request()
        if code in signals.HANDLED:
            if trainer.global_step != self._last_global_step_saved:
                self._save(trainer, must_succeed=True)
            raise signals.Stopped(code)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs mean nothing here."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has no say in when to save."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """
        Raises:
            CheckpointWriteError: the last checkpoint cannot be written.
            Stopped: a signal came too late for the last step to see it.
        """
        self._end_training(trainer)

    def _end_training(self, trainer: Trainer) -> None:
        """Saves the last step before the work after training begins, during which a signal ends the process at once."""
        if trainer.global_step != self._last_global_step_saved:
            self._save(trainer, must_succeed=True)
        self._release_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing is saved: weights in the middle of a step, or full of NaN, must not replace a good checkpoint."""
        with suppress(signals.Stopped):  # what ends the run already
            self._release_signals()
        super().on_exception(trainer, pl_module, exception)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._path.is_file() and trainer.ckpt_path and Path(trainer.ckpt_path).resolve() == self._path.resolve():
            self._last_global_step_saved = checkpoint["global_step"]
            if trainer.state.fn == TrainerFn.FITTING:
                signals.note_saved(self._path, checkpoint["global_step"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "random_states": random_states(), "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_randomness = state_dict.get("random_states")
        self._seed = state_dict.get("seed")

    @property
    def _path(self) -> Path:
        return Path(self.dirpath or ".") / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def _due(self, trainer: Trainer) -> bool:
        """The same on all ranks: from the step and from the reading that they agreed on."""
        by_steps = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if self.every_n_seconds is None:
            return by_steps
        return by_steps or require_clock(Run.of(trainer)).reading.elapsed - self._saved_at >= self.every_n_seconds

    def _save(self, trainer: Trainer, *, must_succeed: bool) -> None:
        if is_trial(trainer) or trainer.sanity_checking:
            return
        clock = Run.of(trainer).clock
        with nullcontext() if clock is None else clock.paused(), Run.of(trainer).phases.inside("checkpoints"):
            path = self._path
            # Part of the state that is saved.
            self.last_model_path = self.best_model_path = str(path)
            checkpoint = dump_checkpoint(trainer)
            error: str | None = None
            if trainer.is_global_zero:
                error = _not_finite(checkpoint["state_dict"] | checkpoint.get("current_model_state", {}))
                try:
                    if error is None:
                        write_checkpoint(path, checkpoint)
                except OSError as failure:
                    error = refused(failure)
            # Rank 0's outcome is everyone's, so that no rank waits for one that failed.
            error = trainer.strategy.broadcast(error)
        self._saved_at = 0.0 if clock is None else clock.reading.elapsed
        if error is not None:
            text = f"checkpoint {path} of step {trainer.global_step} not written: {error}. "
            text += "The one before it, if any, is untouched"
            if must_succeed:
                raise CheckpointWriteError(text)
            rank_zero_warn(text)
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = str(path)
        signals.note_saved(path, trainer.global_step)
        rank_zero_info(f"saved {path} at step {trainer.global_step}")
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _release_signals(self) -> None:
        if self._restore_signals is None:
            return
        restore, self._restore_signals = self._restore_signals, None
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
        self._quiet = None
        restore()


def _not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Names the first tensor with an infinity or NaN, for which nothing may be saved; None where all are finite."""
    finite = {name: torch.isfinite(tensor).all() for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not finite or bool(torch.stack(list(finite.values())).all()):
        return None
    return f"the weights are not finite ({next(name for name, ok in finite.items() if not ok)} is the first)"
