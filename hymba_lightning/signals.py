"""SIGINT, SIGTERM and SIGHUP end a command with 128 + signal, wherever it is; a second one ends it at once.

A first signal raises `Stopped` in the main thread, except where somebody asked to end things in good order: the
training loop takes signals through `divert` and stops after the step in progress. The second one is seen by a thread,
since the main one may stand in a driver's call and never come back to Python.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# What this package's processes leave to those that they start: their id.
STARTER = "HYMBA_STARTED_BY"
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
HANDLED = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Repetitions within these seconds are one signal: torchrun passes on what the terminal sent to its workers too.
SAME_SIGNAL_SECONDS, SAME_SIGNAL_SECONDS_OF_WORKERS = 0.15, 3.0


class Stopped(SystemExit):
    """A signal ended the work; uncaught, it ends the process with the exit code that a shell knows signals by."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signal.Signals(signum)


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a stopped run goes on from."""

    path: Path
    step: int


@dataclass
class _State:
    pending: int = 0
    saved: Saved | None = None
    request: Callable[[int], None] | None = None
    pass_on: Callable[[int], None] | None = None
    watching: bool = False
    starter: int = 0
    """The rank's process that started this one, 0 if none did."""
    lost: bool = False


_state = _State()


def number(name: str, default: int = 0) -> int:
    """A variable of the environment as a whole number; the default where it is none."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        return default


# Lightning takes the variable out of the environment when a Trainer ends.
_WORLD_AT_START = number("WORLD_SIZE", 1)


def ranks() -> tuple[int, int]:
    """This process among those of its run, and among those of its node; a variable left over makes no other."""
    world = max(_WORLD_AT_START, number("WORLD_SIZE", 1))
    return (number("RANK"), number("LOCAL_RANK")) if world > 1 else (0, 0)


def listen(command: str) -> None:
    """Takes over the signals for the rest of this process, except those it was started to ignore (`nohup`, `&`).

    Args:
        command: What the last words begin with, e.g. "hymba fit".
    """
    _take_handlers()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end, command), name="hymba-signals", daemon=True).start()
    _raise_again_what_is_lost(write_end)
    if not _state.watching:
        if number("LOCAL_RANK") > 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
            _state.starter = number(STARTER)
        os.environ[STARTER] = str(os.getpid())
        os.register_at_fork(after_in_child=_leave_to_the_system)
        # Run last of all such functions: the interpreter then gives signals back to the system, which would kill a
        # command that is done while its modules are taken down.
        atexit.register(_ignore, os.getpid())
    _state.watching = True


def all_is_said(command: str) -> None:
    """The work is done: from now on a signal ends the process at once, in the middle of what libraries do at exit."""

    def end(signum: int, frame: FrameType | None) -> None:
        # Past every buffer and lock: this may interrupt a write.
        with contextlib.suppress(OSError):
            os.write(2, f"{command}: ended by {signal_name(signum)} after its work was done\n".encode())
        os._exit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        for signum in HANDLED:
            if signal.getsignal(signum) is _handle:
                signal.signal(signum, end)


def divert(request: Callable[[int], None]) -> Callable[[], None]:
    """Lets signals call `request(signum)` instead of raising, until the function that is returned is called.

    That function raises `Stopped` for a signal which came and was not acted upon. Works without `listen`, too, and in
    a thread that is not the main one does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = _take_handlers()
    _state.request = request
    if _state.pending:  # somebody caught what it raised
        request(_state.pending)

    def restore() -> None:
        _state.request = None
        pending = _state.pending
        if not _state.watching:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            _state.pending = 0
        if pending:
            raise Stopped(pending)

    return restore


def pass_on_by(send: Callable[[int], None] | None) -> None:
    """Has every signal sent on by `send(signum)`, e.g. to processes that this one started."""
    _state.pass_on = send


def note_saved(path: Path, step: int) -> None:
    """Remembers what a stopped run can go on from."""
    _state.saved = Saved(path, step)


def last_saved() -> Saved | None:
    """What was saved last in this process, None if nothing."""
    return _state.saved


def pending() -> int:
    """The signal that came first, 0 if none did."""
    return _state.pending


def follow(signum: int) -> None:
    """Has this process end as if it had got the signal, which ended another rank of its run."""
    _state.pending = _state.pending or signum


def signal_name(signum: int) -> str:
    """E.g. "SIGTERM"."""
    return signal.Signals(signum).name


def launched_by_lightning() -> bool:
    """Whether another rank's process, which had called `listen` as this one has, started it. Ranks that a user starts,
    with the same variables, may outlive the shell that did."""
    return bool(_state.starter)


def wait_for_parent(seconds: float = 5.0) -> None:
    """Lets the rank that started this process end first: Lightning there kills it when it finds a child failed, in
    the middle of saying why."""
    parent, end = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.02)


def end_with_parent(command: str, seconds: float = 10.0) -> None:
    """Ends this process, the rank of a run that another one started, so long after that one is gone.

    Before the ranks have met, nothing else would end it: it would wait for rank 0 for half an hour.
    """
    # It may be gone already: importing what this process needs takes seconds.
    parent = _state.starter or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(seconds)  # most end by themselves
        with contextlib.suppress(OSError):
            os.write(2, f"{command}: the process that started this rank is gone; this one ends too\n".encode())
        os._exit(1)

    threading.Thread(target=watch, name="hymba-parent", daemon=True).start()


def _take_handlers() -> dict[int, Any]:
    """Installs the handler; returns the ones before."""
    previous = {signum: signal.getsignal(signum) for signum in HANDLED}
    previous = {signum: handler for signum, handler in previous.items() if handler != signal.SIG_IGN}
    for signum in previous:
        signal.signal(signum, _handle)
    return previous


def _raise_again_what_is_lost(write_end: int) -> None:
    """Has `Stopped` raised once more where Python drops it: errors in an object's finalizer only reach this hook."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Stopped):
            _state.lost = True
            os.write(write_end, b"\0")  # to the thread, since here it would be lost again
        else:
            usual(unraisable)

    sys.unraisablehook = hook


def _handle(signum: int, frame: FrameType | None) -> None:
    if _state.lost and _state.request is None:
        _state.lost = False
        raise Stopped(_state.pending)
    if _state.pending:
        if not _state.watching:
            raise Stopped(signum)  # no thread ends the process
        return
    _state.pending = signum
    if _state.pass_on is not None:
        _state.pass_on(signum)
    if _state.request is None:
        raise Stopped(signum)
    _state.request(signum)


def _watch(read_end: int, command: str) -> None:
    """Ends the process at the second signal."""
    first: float | None = None
    sent = 0
    while True:
        for signum in os.read(read_end, 64):
            if not signum and _state.lost:
                time.sleep(0.01)
                sent += 1
                signal.pthread_kill(threading.main_thread().ident or 0, _state.pending)
            if signum not in HANDLED:
                continue
            if sent:  # by this thread
                sent -= 1
                continue
            now = time.monotonic()
            same = SAME_SIGNAL_SECONDS_OF_WORKERS if "LOCAL_RANK" in os.environ else SAME_SIGNAL_SECONDS
            if first is None:
                first = now
            elif now - first > same:
                # Past every buffer and lock; a live bar has hidden the terminal's cursor.
                show_cursor = "\x1b[?25h" if sys.__stdout__ is not None and os.isatty(1) else ""
                text = f"{show_cursor}\n{command}: ended at once by a second {signal.Signals(signum).name}\n"
                try:
                    os.write(2, text.encode())
                finally:
                    os._exit(128 + signum)


def _ignore(pid: int) -> None:
    if os.getpid() == pid:
        for signum in HANDLED:
            signal.signal(signum, signal.SIG_IGN)


def _leave_to_the_system() -> None:
    """In a forked child, such as a pool's worker: signals end it as they end any process."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.set_wakeup_fd(-1)
    _state.pass_on, _state.request, _state.pending = None, None, 0
    for signum in HANDLED:
        if signal.getsignal(signum) is _handle:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
