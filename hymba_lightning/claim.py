"""A lock on a folder, so that one process at a time writes to it; released however the process ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from hymba_lightning.files import write_atomic
from hymba_lightning.text import printable

LOCK, OWNER = ".lock", ".owner.json"
# Of what the owner's file says.
MOST_CHARS = 300


class FolderInUseError(OSError):
    """Another process writes to the folder."""


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and those around it, as far as they do not exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


class FolderClaim:
    """The right to write to a folder, held by one process at a time.

    The claim is the operating system's lock of a file in the folder: it is taken in one step, and ends with the process
    that holds it, killed or not, so that no claim can be left behind. Beside it lies who holds it, for the message to
    whoever comes second. It may be used as a context manager, and taken once at a time.

    Args:
        folder: Made if it does not exist.
        work: What the holder does, such as "hymba fit"; shown to others.
        made: Folders, the claimed one first, that were made for it already.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, work: str, made: Sequence[Path] = ()) -> None:
        self.folder = Path(folder)
        self.work = work
        self._lock = FileLock(self.folder / LOCK, timeout=0)
        self._made = list(made)
        """Folders that did not exist before, the claimed one first."""

    @property
    def held(self) -> bool:
        """Whether this object holds the folder."""
        return self._lock.is_locked

    def take(self) -> None:
        """
        Raises:
            FolderInUseError: another process, or another claim in this one, holds the folder.
        """
        for attempt in range(3):
            self._make()
            try:
                self._lock.acquire()
                break
            except (Timeout, FileNotFoundError) as error:
                # Whoever made the folder and left nothing in it takes it away again, lock and all, perhaps just now.
                if attempt < 2 and not (self.folder / LOCK).exists():
                    continue
                if isinstance(error, FileNotFoundError):
                    raise
                raise FolderInUseError(
                    f"{self.folder} is in use by {self._owner()}: wait for its end, or choose another folder"
                ) from None
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"work": self.work, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
        # Of holders that were killed while they wrote this.
        for leftover in self.folder.glob(f".{OWNER}.*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        # Only for the message to others: the lock holds without it, also on a full disk.
        with contextlib.suppress(OSError):
            write_atomic(self.folder / OWNER, json.dumps(owner) + "\n")

    def release(self) -> None:
        """Gives the lock back, if it is held. A folder that was made for the claim and holds
        nothing else is taken away."""
        if self.held:
            (self.folder / OWNER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._unmake()
            self._lock.release()

    def _make(self) -> None:
        missing = missing_folders(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            paths = (self.folder, *self.folder.parents)
            file = next((path for path in paths if os.path.lexists(path) and not path.is_dir()), None)
            why = error.strerror
            if file is not None:
                why = f"{file} is a link to nowhere" if file.is_symlink() and not file.exists() else f"{file} is a file"
            raise NotADirectoryError(f"the folder {self.folder} cannot be made: {why}") from error
        except OSError as error:
            raise type(error)(error.errno, f"the folder cannot be made: {error.strerror}", str(self.folder)) from error
        self._made = missing or self._made

    def _unmake(self) -> None:
        if self._made and {path.name for path in self.folder.iterdir()} == {LOCK}:
            (self.folder / LOCK).unlink()
            for folder in self._made:
                folder.rmdir()
            self._made = []

    def __enter__(self) -> FolderClaim:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _owner(self) -> str:
        # Who has only just taken the folder may still be writing that down, on a slow disk.
        for wait in (0.05, 0.15, 0.8, 0.0):
            try:
                owner = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
                said = f"{owner['work']} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
                return printable(said, MOST_CHARS)
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                time.sleep(wait)
        return "another process, which does not say who it is"
