"""The stopwatch of the budget: it can be paused, also within a pause, and seconds can be added while it is paused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Counts while it is started and nobody pauses it.

    Args:
        time_fn: monotonic seconds.
        finish_work: called before the watch halts, to wait for work in progress that belongs to the time before.
    """

    def __init__(self, time_fn: Callable[[], float], finish_work: Callable[[], None] = lambda: None) -> None:
        self.time_fn = time_fn
        self.finish_work = finish_work
        self._counted = 0.0
        self._since: float | None = None
        self._started = False
        self._pause_depth = 0

    @property
    def started(self) -> bool:
        """Between `start` and `stop`, paused or not."""
        return self._started

    def elapsed(self) -> float:
        """Seconds counted so far."""
        return self._counted + (0.0 if self._since is None else self.time_fn() - self._since)

    def set_elapsed(self, seconds: float) -> None:
        """Go on from `seconds`, running or not."""
        self._counted = seconds
        if self._since is not None:
            self._since = self.time_fn()

    def reset(self) -> None:
        """Stopped and not paused by anyone; what was counted stays."""
        self._started, self._since, self._pause_depth = False, None, 0

    def start(self) -> None:
        """Count from now on, or from the end of the pause in progress."""
        self._started = True
        self._run_if_due()

    def stop(self) -> None:
        """Count no more."""
        self._halt()
        self._started = False

    def pause(self) -> None:
        """Stand still until as many `resume` as `pause` calls were made."""
        self._pause_depth += 1
        self._halt()

    def resume(self) -> None:
        """End one `pause`."""
        self._pause_depth -= 1
        self._run_if_due()

    @contextmanager
    def charged(self) -> Iterator[None]:
        """What happens inside counts, although the watch is stopped or paused."""
        started, depth = self._started, self._pause_depth
        self._pause_depth = 0
        self.start()
        try:
            yield
        finally:
            self._halt()
            self._started, self._pause_depth = started, depth
            self._run_if_due()

    def _halt(self) -> None:
        if self._since is None:
            return
        self.finish_work()
        self._counted, self._since = self.elapsed(), None

    def _run_if_due(self) -> None:
        if self._started and self._pause_depth == 0 and self._since is None:
            self._since = self.time_fn()
