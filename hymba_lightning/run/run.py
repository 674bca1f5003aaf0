"""What the parts of a run know of each other: one object a Trainer, which callbacks and module write to and read."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from torch import nn

from hymba_lightning.evaluation.score import Score
from hymba_lightning.evaluation.ttt import ChunkScore, ScoreFirstTTT
from hymba_lightning.model import Hymba
from hymba_lightning.run.folder import RunFolder
from hymba_lightning.run.history import History, Losses, ValRow
from hymba_lightning.run.phases import Phases
from hymba_lightning.run.record import RunRecord

if TYPE_CHECKING:
    from hymba_lightning.run.finish import ExportSettings


# Where a Trainer carries its run: it lives as long as the Trainer, and no longer.
ATTRIBUTE = "hymba_run"


@dataclass(frozen=True)
class ClockReading:
    """What every rank agrees on before an optimizer step."""

    step: int
    """Optimizer steps done."""
    elapsed: float
    """Training seconds spent."""
    mean_step: float | None
    """Mean seconds per optimizer step so far, None before the first."""
    budget: float | None
    """Usable seconds in all (budget minus reserve), None without a budget."""
    progress: float
    """Share of the run done, 0 to 1: of the budget or of max_steps, whichever is further on."""
    remaining: float | None
    """Usable seconds left, not below 0, None without a budget."""
    max_steps: int | None = None
    """Step limit of the run, None without one."""

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps left to the step limit, None without one."""
        return None if self.max_steps is None else max(self.max_steps - self.step, 0)

    @property
    def expected_steps(self) -> int | None:
        """Optimizer steps of the whole run; with a budget None until ten steps, or a fifth of it, tell their time."""
        if self.remaining is None or self.mean_step is None:
            return self.max_steps if self.remaining is None else None
        if self.step < 10 and self.progress < 0.2:
            return None
        by_time = self.step + round(self.remaining / max(self.mean_step, 1e-9))
        return by_time if self.max_steps is None else min(by_time, self.max_steps)


class Clock(Protocol):
    """The part of the training clock that the rest of a run uses."""

    budget_seconds: float | None
    reserve_seconds: float
    stop_reason: str | None
    stop_code: int

    @property
    def reading(self) -> ClockReading: ...
    def elapsed(self) -> float: ...
    def paused(self) -> AbstractContextManager[None]: ...
    def charged(self) -> AbstractContextManager[None]: ...
    def request_stop(self, code: int = 1) -> None: ...
    def agree_on_request(self) -> int: ...
    def end(self) -> None: ...


class Average(Protocol):
    """The averaged weights beside the trained ones."""

    @property
    def has_average(self) -> bool: ...
    def swapped(self, module: nn.Module) -> AbstractContextManager[None]: ...
    def raw_weights(self, module: nn.Module) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Validation:
    """The latest validation: of which step, and what came out."""

    step: int
    score: Score


class Testing:
    """A test in progress: scores so far, and what adapts the network."""

    def __init__(self, ttt: ScoreFirstTTT) -> None:
        self.ttt = ttt
        self.scores: list[Score] = []
        """Of the chunks of which something was scored; a last one under a sequence may have been dropped, and one
        without a byte of text is part of another."""
        self.n_chunks = 0
        self.chunk: ChunkScore | None = None
        """The chunk that was scored last."""

    def add(self, chunk: ChunkScore) -> None:
        """Takes the next chunk's final score."""
        self.chunk = chunk
        self.n_chunks += 1
        if chunk.score.n_tokens:
            # What stands for no byte of text counts with the chunk beside it.
            alone = not self.scores or (chunk.score.n_bytes and self.scores[-1].n_bytes)
            self.scores.append(chunk.score if alone else self.scores.pop() + chunk.score)

    def total(self) -> Score:
        """Sum over all chunks so far."""
        total = self.scores[0]
        for score in self.scores[1:]:
            total = total + score
        return total


def _no_display(text: str, done: float, total: float) -> None:
    """Nobody watches."""


class Run:
    """State of one Trainer's run. `Run.of(trainer)` is the same object for every callback, and for fit and test."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self._shared = False
        self._net: Hymba | None = None
        self.record = RunRecord()
        self.history = History()
        self.losses = Losses()
        self.clock: Clock | None = None
        self.average: Average | None = None
        self.export: ExportSettings | None = None
        """What is to become of the weights, None for nothing."""
        self.plots = True
        self.started_fit = False
        """Whether the folder belongs to the fit in progress."""
        self.settled = False
        """Whether that fit has made a step."""
        self.before_finish: list[Callable[[], None]] = []
        """Called where the run's end is (again) to be made."""
        self.ends = False
        """Whether somebody finishes the fit in progress."""
        self.before_end: list[Callable[[], None]] = []
        """Called between training and the run's end."""
        self.ended = False
        """Whether the fit in progress has been finished."""
        self.seed: int | None = None
        """What the run's random numbers began with, None where nobody said."""
        self.batch_tokens = 0
        """Target tokens of this rank's last micro-batch."""
        self.batch_seq_len = 0
        self.lr_scale = 1.0
        """Factor of the present step's learning rates."""
        self.warming_up = False
        """Whether the steps that run now are undone afterwards."""
        self.validation: Validation | None = None
        self.testing: Testing | None = None
        self.weights_from: Path | None = None
        """File that the network under validation or test was loaded from."""
        self.command_started: float | None = None
        """time.monotonic() when the command began that the next stage is run for."""
        self.phases = Phases()
        self.started = time.monotonic()
        """When the stage in progress began, the command's own start included."""
        self.schedules: list[Callable[[ClockReading], None]] = []
        """Called with the agreed reading before every optimizer step."""
        self.display: Callable[[str, float, float], None] = _no_display
        """Shows (text, done, total) of work that is no loop of the Trainer's."""

    def start_stage(self, data_seconds: float = 0.0) -> None:
        """Another fit, validation or test begins: its time runs from now, or from the start of its command.

        Args:
            data_seconds: What opening the data took, just before.
        """
        now = time.monotonic()
        self.started = now if self.command_started is None else self.command_started
        self.command_started = None
        self.phases = Phases(min(self.started, now - data_seconds))
        self.phases.move(data_seconds, "data")

    @property
    def net(self) -> Hymba:
        """The network in training or under test.

        Raises:
            RuntimeError: no module has named its network yet.
        """
        if self._net is None:
            raise RuntimeError("the run has no network before the Trainer's setup")
        return self._net

    @net.setter
    def net(self, net: Hymba) -> None:
        self._net = net

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Run:
        """The Trainer's run."""
        run = getattr(trainer, ATTRIBUTE, None)
        if run is None:
            run = cls()
            setattr(trainer, ATTRIBUTE, run)
        return run

    def note_validation(self, trainer: pl.Trainer, score: Score) -> None:
        """Takes the score of the averaged weights after the present step into the history and the logs."""
        self.validation = Validation(trainer.global_step, score)
        seconds = 0.0 if self.clock is None else self.clock.elapsed()
        self.history.val.append(ValRow(trainer.global_step, seconds, self.history.tokens, score.loss, score.bpb))
        for logger in trainer.loggers:
            logger.log_metrics({"val/loss": score.loss, "val/bpb": score.bpb}, step=trainer.global_step)
            # The same score once more, drawn against tokens instead of steps.
            logger.log_metrics({"val_by_tokens/bpb": score.bpb}, step=self.history.tokens)

    def folder_of(self, trainer: pl.Trainer) -> RunFolder:
        """The folder, the same on all ranks; every rank must ask at the same moment the first time.

        It is what `--run_dir` says, else the Trainer's default_root_dir, else a new one under runs/ named after the
        time. Loggers have no say in it.
        """
        if self.folder is None:
            root = Path(trainer.default_root_dir)
            self.folder = RunFolder(new_folder() if root == Path.cwd() else root)
        if trainer.world_size > 1 and not self._shared:
            self.folder.path = Path(trainer.strategy.broadcast(str(self.folder.path)))
        self._shared = True
        return self.folder


def new_folder() -> Path:
    """runs/<date>-<time>, with a number where that exists already."""
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    tried = Path("runs") / name
    number = 2
    while tried.exists():
        tried = Path("runs") / f"{name}-{number}"
        number += 1
    return tried


def require_clock(run: Run) -> Clock:
    """
    Raises:
        ValueError: the run has no clock.
    """
    if run.clock is None:
        raise ValueError("this needs a WallClock callback: HymbaModule brings one with it")
    return run.clock


def settings_of(**values: Any) -> dict[str, Any]:
    """Plain JSON values of a score's settings."""
    return {key: value for key, value in values.items() if value is not None}
