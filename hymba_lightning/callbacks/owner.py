"""For callbacks that write to the run's folder: claim it, clear what an old run left, let go of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from hymba_lightning.run.record import RunRecord
from hymba_lightning.run.run import Run
from hymba_lightning.trainer_internals import agree_on_rank, is_trial


class FolderOwner(pl.Callback):
    """Owns the run's folder from setup to teardown; several such callbacks of one Trainer own it together."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            FolderInUseError: another process writes to the folder.
            OSError: it cannot be made.
        """
        super().setup(trainer, pl_module, stage)
        agree_on_rank(trainer)
        run = Run.of(trainer)
        folder = run.folder_of(trainer)

        def claim() -> None:
            claim_folder(trainer, f"hymba {TrainerFn(trainer.state.fn).value}")
            if stage != "fit":
                run.record = RunRecord.load(folder.path)

        if not is_trial(trainer):
            _on_rank_0(trainer, claim)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the folder, and deletes what an old run left there: all other checks of the options have passed.

        Raises:
            RunExistsError: the folder holds another run.
        """
        run = Run.of(trainer)
        folder = run.folder_of(trainer)

        def start() -> None:
            folder.start(trainer.ckpt_path)
            run.record = RunRecord.load(folder.path)

        if not is_trial(trainer) and not run.started_fit:
            run.started_fit = True
            _on_rank_0(trainer, start)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the folder as this run's: its first step is done."""
        settle(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the folder as this run's: weights and data are loaded, and no check is left that could refuse them."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            Run.of(trainer).settled = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_validation_start`."""
        Run.of(trainer).settled = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        _close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _close(trainer)


def claim_folder(trainer: pl.Trainer, work: str) -> None:
    """Claims the folder of the Trainer's run for this process, with those that its loggers write to.

    Raises:
        FolderInUseError: another process writes to the folder.
        OSError: it cannot be made.
    """
    folder = Run.of(trainer).folder
    assert folder is not None
    folder.log_dirs = [Path(path) for logger in trainer.loggers if (path := getattr(logger, "log_dir", None))]
    folder.claim(work)


def _on_rank_0(trainer: pl.Trainer, work: Callable[[], None]) -> None:
    """Calls `work` on rank 0, and raises its error on every rank, so that none waits for a rank 0 that is gone."""
    outcome: Exception | None = None
    if trainer.is_global_zero:
        try:
            work()
        except (OSError, ValueError) as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if outcome is not None:
        raise outcome


def settle(trainer: pl.Trainer) -> None:
    """Deletes, on rank 0, what was kept of the run that this one replaces."""
    run = Run.of(trainer)
    if run.started_fit and not run.settled and run.folder is not None:
        run.settled = True
        if trainer.is_global_zero:
            run.folder.settle()


def _flush(trainer: pl.Trainer) -> None:
    """TensorBoard's writer opens its file for each write: none may come after the file is gone."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()


def _close(trainer: pl.Trainer) -> None:
    run = Run.of(trainer)
    if run.folder is not None and run.folder.is_open:
        if not run.settled and trainer.is_global_zero:
            _flush(trainer)
            run.folder.restore()
        run.folder.close()
    run.started_fit = run.settled = False
