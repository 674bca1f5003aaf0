"""Standard output and error that may break: a closed pipe, a full disk or a lost terminal never ends training."""

from __future__ import annotations

import errno
import locale
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

ASCII = ("ascii", "ansi_x3.4-1968", "us-ascii", "646")


class GuardedStream:
    """A text stream that falls silent when it can no longer be written to.

    Its descriptor then leads to the null device, so that what libraries and child processes print goes there as well.

    Args:
        stream: What is written to.
        must_arrive: Raise the OSError instead: for commands that are nothing but their output.
    """

    def __init__(self, stream: TextIO, must_arrive: bool = False) -> None:
        self._stream = stream
        self._must_arrive = must_arrive
        self.lost: OSError | None = None
        """Why text did not arrive, where some did not."""

    def write(self, text: str) -> int:
        """Returns the number of characters that were taken, arrived or not."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._fell_silent(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`, for each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream; a reader that is gone is an error only where the output must arrive."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fell_silent(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def _fell_silent(self, error: OSError | ValueError) -> None:
        if isinstance(error, UnicodeError):
            raise error
        # ValueError is "I/O operation on closed file".
        if isinstance(error, BlockingIOError):
            return  # this text is lost, the next may find room
        if isinstance(error, OSError):
            # Which its message names.
            error.filename = "standard output"
            self.lost = self.lost or error
            _to_null(self._stream)
        if self._must_arrive:
            raise error


def guard(must_arrive: bool = False) -> None:
    """Puts guarded streams of UTF-8 in the places of sys.stdout and sys.stderr.

    Args:
        must_arrive: Whether standard output that breaks ends the command; stderr never does.
    """
    _fill_closed_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
        elif hasattr(stream, "reconfigure"):
            # ASCII is what a C locale gets; everybody who reads us reads UTF-8.
            ascii_only = (stream.encoding or "").lower() in ASCII
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream, must_arrive and name == "stdout"))


def check_arrived() -> None:
    """
    Raises:
        OSError: some of what was printed did not arrive, whoever has passed over that, as argparse does; not where a
            reader has read enough.
    """
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is not None and not broken_pipe(lost):
        raise lost


def ascii_locale() -> bool:
    """Whether this process takes files for ASCII where nothing else is said, as libraries' files are opened."""
    return not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() in ASCII


def start_again_in_utf8() -> None:
    """Replaces this process by the same command in Python's UTF-8 mode, which its children have, too.

    Does nothing where the command line is not this process's own, as in a child of multiprocessing.
    """
    if sys.argv[1:] == sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] and len(sys.orig_argv) > 1:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def broken_pipe(error: BaseException) -> bool:
    """Whether the error says that the reader of our output is gone (as `head` goes), which is not reported."""
    return isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE)


def _fill_closed_descriptors() -> None:
    """The next file that is opened must not become standard output, where a library may print into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def _to_null(stream: TextIO) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        return
