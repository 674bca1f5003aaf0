"""Writing files so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Weights in a run's folder, or in one of its checkpoints.
OF_A_RUN = ("artifact.hymba", "checkpoints/last.ckpt", "last.ckpt")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes `content` beside `path` and moves it there in one step; the old file stays whole until then.

    Raises OSError (a full disk, no permission) that names `path`; the old file is then untouched, the temporary one
    removed. So is a device or a pipe, which a file would replace for every program: /dev/null, say.
    """
    check_place(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def check_place(path: Path) -> None:
    """
    Raises:
        OSError: a file at `path` would take the place of a device, a pipe or a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is written there: name a file")
    # /dev/stdout is a link, perhaps to a file.
    if path.parent.resolve() == Path("/dev") or (path.exists() and not path.is_file()):
        raise FileExistsError(f"{path} is a device or a pipe, whose place a file would take: name a file of its own")


def not_a_file(named: str, path: str | Path, wanted: str) -> FileNotFoundError:
    """The error for a path at which no file stands: what stands there instead, and what of a run is near.

    Args:
        named: How the user named it, e.g. "--ckpt_path runs/a".
        path: The same as a path.
        wanted: The file that was to stand there, e.g. "a checkpoint".
    """
    path = Path(path)
    if not path.exists():
        return FileNotFoundError(f"{named} does not exist")
    if not path.is_dir():
        return FileNotFoundError(f"{named} is no regular file, and {wanted} is needed")
    inside = [path / name for name in OF_A_RUN]
    near = " or ".join(str(file) for file in inside if file.is_file())
    return FileNotFoundError(
        f"{named} is a folder, and {wanted} is needed" + (f" (did you mean {near}?)" if near else "")
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses within names the file that is written: a full disk says nothing of it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = os.fspath(path)
            if error.filename2 is not None:
                # None would be printed.
                del error.filename2
        raise


def _umask() -> int:
    """The process's umask, from /proc where there is one: os.umask could only read it by setting it for all threads."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
