"""For callbacks that write to the run's folder: claim it, clear what an old run left, let go of it."""

from typing import Any

import lightning.pytorch as pl

from hymba_lightning.run.record import RunRecord
from hymba_lightning.run.run import Run
from hymba_lightning.trainer_internals import is_trial


class FolderOwner(pl.Callback):
    """Owns the run's folder from setup to teardown; several such callbacks of one Trainer own it together."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            RunExistsError: the folder holds another run.
            FolderInUseError: another process writes there.
            OSError: it cannot be made.
        """
        super().setup(trainer, pl_module, stage)
        if not is_trial(trainer):
            _own(trainer, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything that can be refused was: what an old run left may go."""
        folder = Run.of(trainer).folder
        if folder is not None and trainer.is_global_zero and not is_trial(trainer):
            folder.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        _close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _close(trainer)


def _own(trainer: pl.Trainer, stage: str) -> None:
    run = Run.of(trainer)
    folder = run.folder_of(trainer)
    outcome: Any = None
    # Rank 0's outcome is everyone's, so that no rank waits for one that was refused.
    if trainer.is_global_zero and not folder.is_open:
        try:
            if stage == "fit":
                folder.open("hymba fit", trainer.ckpt_path)
                run.record = RunRecord.load(folder.path) if folder.owns(trainer.ckpt_path) else RunRecord()
            else:
                folder.claim(f"hymba {stage}")
                run.record = RunRecord.load(folder.path)
        except (OSError, ValueError) as error:
            folder.close()
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if outcome is not None:
        raise outcome


def _close(trainer: pl.Trainer) -> None:
    folder = Run.of(trainer).folder
    if folder is not None:
        folder.close()
