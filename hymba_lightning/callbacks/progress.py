"""One progress display for training, validation, export and test-time training: a live bar, or plain lines in a log."""

import sys
import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hymba_lightning.run.run import Run, require_clock


class BudgetProgressBar(ProgressBar):
    """Shows what the run is doing and what is left of the budget.

    On a terminal a live bar; elsewhere (a file, a pipe) a plain line every `plain_seconds`. Rank 0 only.

    Args:
        refresh_seconds: least time between two updates of the bar.
        plain_seconds: least time between two lines where there is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5, plain_seconds: float = 10.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.plain_seconds = plain_seconds
        self._enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown_at = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # The display -------------------------------------------------------------------------------------------------

    def stage(self, text: str, done: float = 0.0, total: float = 1.0) -> None:
        """Shows a part of the work after training: `done` of `total` of it lie behind when `text` begins.

        `done` equal to `total` ends the bar, at 100 %.
        """
        self._show("finish", done, total, text, force=True)
        if done >= total:
            self._close()

    def _show(self, label: str, done: float, total: float, detail: str, force: bool = False) -> None:
        if not self._enabled:
            return
        live = sys.stdout.isatty()
        now = time.monotonic()
        if not force and now - self._shown_at < (self.refresh_seconds if live else self.plain_seconds):
            return
        self._shown_at = now
        if not live:
            print(f"{label} {100 * done / max(total, 1e-9):5.1f}%  {detail}", flush=True)
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description:<11}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f}%"),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeRemainingColumn(),
            )
            # What is printed meanwhile, log lines too, goes above the bar; stderr in a file stays there.
            console = Console(markup=False, emoji=False)
            self._progress = Progress(*columns, console=console, redirect_stderr=sys.stderr.isatty())
            self._progress.start()
        if self._task is None:
            self._task = self._progress.add_task(label, total=total, detail=detail)
        self._progress.update(self._task, description=label, completed=done, total=total, detail=detail)

    def _close(self, done: bool = True) -> None:
        """Ends the bar; what is done ends at 100 %, even if its last part was too quick to be shown."""
        if self._progress is not None:
            if done and self._task is not None:
                self._progress.update(self._task, completed=self._progress.tasks[-1].total)
            self._progress.stop()
        self._progress, self._task, self._shown_at = None, None, 0.0

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.console.print(*args, markup=False)
        else:
            print(*args, **kwargs)

    # Training ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()
        Run.of(trainer).display = self.stage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Run.of(trainer).before_end.append(partial(self._end_training, trainer))

    def _end_training(self, trainer: pl.Trainer) -> None:
        """The bar of training ends before that of what comes after it begins."""
        self._show("training", 1.0, 1.0, _training_detail(trainer), force=True)
        self._close()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show("training", require_clock(Run.of(trainer)).reading.progress, 1.0, _training_detail(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(done=False)

    # Validation, export, test ------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            total = trainer.num_val_batches[0]
            self._show("validation", batch_idx + 1, total, f"batch {batch_idx + 1} of {total}")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        testing = Run.of(trainer).testing
        if testing is None:
            return
        total = testing.total()
        last = batch_idx + 1 == batch.n_chunks
        self._show(
            "test",
            batch_idx + 1,
            batch.n_chunks,
            f"chunk {batch_idx + 1} of {batch.n_chunks}  running bpb {total.bpb:.4f}",
            force=last,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()


def _training_detail(trainer: pl.Trainer) -> str:
    run = Run.of(trainer)
    reading, rows = require_clock(run).reading, run.history.train
    detail = f"step {trainer.global_step}"
    if rows:
        detail += f"  loss {rows[-1].loss:.4f}  {rows[-1].tokens_per_s:,.0f} tok/s"
    if reading.remaining is not None:
        detail += f"  {reading.elapsed:.1f} of {reading.budget:.1f} s used"
    return detail
