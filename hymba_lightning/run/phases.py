"""Where the wall clock of a run went: every second belongs to one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal[
    "start",
    "data",
    "warm_up",
    "training",
    "validation",
    "checkpoints",
    "scoring",
    "calibration",
    "export",
    "summary",
]
# In the order of a run.
PHASES: dict[Phase, str] = {
    "start": "imports, options, network, ranks",
    "data": "opening and checking the data",
    "warm_up": "steps and calibration that compile, before the clock",
    "training": "optimizer steps",
    "validation": "validations between them",
    "checkpoints": "writing checkpoints",
    "scoring": "scores of the finished weights and of the artifact",
    "calibration": "what rounding has to know of the data",
    "export": "quantizing, compressing, reading back",
    "summary": "pictures and summaries",
}


class Phases:
    """Seconds by phase, of this process and of those that a run went on from.

    Args:
        started: time.monotonic() when the first phase began, now by default.
        time_fn: monotonic seconds; replaced in tests.
    """

    def __init__(self, started: float | None = None, time_fn: Callable[[], float] = time.monotonic) -> None:
        self._time_fn = time_fn
        self._seconds: dict[Phase, float] = {}
        self._now: list[Phase] = ["start"]
        self._since = time_fn() if started is None else started

    def begin(self, phase: Phase) -> None:
        """The phase before ends, and this one begins."""
        self._count()
        self._now[-1] = phase

    @contextmanager
    def inside(self, phase: Phase) -> Iterator[None]:
        """What happens inside belongs to `phase`; what comes after, to the one before again. May be nested."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def enter(self, phase: Phase) -> None:
        """Begins what `leave` ends."""
        self._count()
        self._now.append(phase)

    def leave(self) -> None:
        """Goes back to the phase before the last `enter`; nothing happens without one."""
        self._count()
        if len(self._now) > 1:
            self._now.pop()

    def move(self, seconds: float, to: Phase) -> None:
        """Some of the present phase's seconds were another's."""
        self._count()
        now = self._now[-1]
        self._seconds[now] = self._seconds.get(now, 0.0) - seconds
        self._seconds[to] = self._seconds.get(to, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Phase → seconds so far, in the order of a run; phases that there were none of are left out."""
        self._count()
        return {phase: self._seconds[phase] for phase in PHASES if self._seconds.get(phase, 0.0) > 0.0}

    def add(self, before: dict[str, float]) -> None:
        """Takes in what the processes that this run goes on from have counted."""
        for phase in PHASES:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + float(before.get(phase, 0.0))

    def _count(self) -> None:
        now, phase = self._time_fn(), self._now[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now
