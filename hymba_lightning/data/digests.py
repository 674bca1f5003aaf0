"""SHA-256 of large files, remembered beside them: shards are hashed once, and sampled at every later start.

What is remembered holds for one state of a file (size, times of modification and of change, inode). A file that is
damaged without a change of these, by a failing disk, is found by the sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from hymba_lightning.files import write_atomic

log = logging.getLogger("hymba_lightning")

MEMORY_FILE = ".digests.json"
BLOCK_BYTES = 1 << 20
# Blocks of a file read again at every start: 50 shards of 200 MB are sampled in a quarter of a second.
SAMPLED_BLOCKS = 4
# A file that changed only just now may change again without another time stamp.
SETTLED_SECONDS = 2.0
# Coarsest steps of a local file system's time stamps.
TICK_SECONDS = 0.02
HASHING_THREADS = 8
LOCK_SECONDS = 600.0
TOLD_BYTES = 1 << 30


class FileDigest(NamedTuple):
    """What a file holds."""

    sha256: str
    """In hexadecimal."""
    blocks: list[int]
    """CRC-32 of every BLOCK_BYTES."""


def hash_file(path: str | os.PathLike[str]) -> FileDigest:
    """Reads the whole file. Raises OSError where that fails."""
    digest, blocks, buffer = hashlib.sha256(), [], bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while n_read := _fill(file, view):
            digest.update(view[:n_read])
            blocks.append(zlib.crc32(view[:n_read]))
    return FileDigest(digest.hexdigest(), blocks)


def hash_files(paths: Sequence[Path]) -> dict[Path, FileDigest]:
    """`hash_file` of several, in threads."""
    with ThreadPoolExecutor(HASHING_THREADS, "hymba-digest") as pool:
        return dict(zip(paths, pool.map(hash_file, paths), strict=True))


def file_digests(paths: Sequence[Path], *, sample: bool = True) -> list[str]:
    """SHA-256 of each file, in hexadecimal; only files that are not remembered are read as a whole.

    Processes that ask at once wait for the first one's hashing. The memory lies beside the files, or, where that folder
    cannot be written to, in the user's cache.

    Args:
        paths: Files.
        sample: Read some blocks of remembered files again; one of which a block differs is hashed anew.

    Raises:
        OSError: A file cannot be read.
    """
    resolved = [Path(os.path.realpath(path)) for path in paths]
    known: dict[Path, str] = {}
    for folder in dict.fromkeys(path.parent for path in resolved):
        files = [path for path in dict.fromkeys(resolved) if path.parent == folder]
        known |= _folder_digests(folder, files, sample)
    return [known[path] for path in resolved]


def remember(folder: Path, digests: Mapping[str, FileDigest]) -> None:
    """Notes what files of the folder hold, by name; for the process that has just written them."""
    # Whoever changes them from here on leaves another time stamp.
    time.sleep(TICK_SECONDS)
    folder = Path(os.path.realpath(folder))
    with _locked(folder):
        memory = _read(folder)
        memory |= {name: [_stamp(folder / name), *digest] for name, digest in digests.items()}
        _write(folder, memory)


def _folder_digests(folder: Path, files: list[Path], sample: bool) -> dict[Path, str]:
    memory = _read(folder)
    known = {
        path: digest.sha256
        for path in files
        if (digest := _recall(memory, path)) and not (sample and _differs(path, digest))
    }
    damaged = {path for path in files if path not in known and _recall(memory, path)}
    if len(known) == len(files):
        return known
    with _locked(folder):
        memory = _read(folder)
        unknown = []
        for path in files:
            digest = None if path in damaged else _recall(memory, path)
            if digest is None:
                unknown.append(path)
            else:
                known[path] = digest.sha256
        n_bytes = sum(path.stat().st_size for path in unknown)
        if n_bytes > TOLD_BYTES:
            log.info("hashing %.1f GB in %s, once", n_bytes / 1e9, folder)
        stamps, now = {path: _stamp(path) for path in unknown}, time.time()
        hashed = hash_files(unknown)
        known |= {path: digest.sha256 for path, digest in hashed.items()}
        memory |= {
            path.name: [stamps[path], *digest]
            for path, digest in hashed.items()
            if _stamp(path) == stamps[path] and max(stamps[path][1:3]) / 1e9 < now - SETTLED_SECONDS
        }
        _write(folder, memory)
    return known


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _recall(memory: dict[str, list], path: Path) -> FileDigest | None:
    entry = memory.get(path.name)
    return FileDigest(*entry[1:]) if entry is not None and entry[0] == _stamp(path) else None


def _differs(path: Path, digest: FileDigest) -> bool:
    """Whether any of a few randomly chosen blocks of the file has another checksum than was remembered."""
    chosen = random.SystemRandom().sample(range(len(digest.blocks)), min(SAMPLED_BLOCKS, len(digest.blocks)))
    with open(path, "rb") as file:
        for index in chosen:
            file.seek(index * BLOCK_BYTES)
            if zlib.crc32(file.read(BLOCK_BYTES)) != digest.blocks[index]:
                return True
    return False


def _fill(file: object, view: memoryview) -> int:
    """Reads until the view is full or the file ends, since blocks are numbered by their place."""
    n_read = 0
    while n_read < len(view) and (more := file.readinto(view[n_read:])):  # type: ignore[attr-defined]
        n_read += more
    return n_read


def _memories(folder: Path) -> list[Path]:
    """Where the folder's digests may lie, the best place first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hymba_lightning" / "digests"
    return [folder / MEMORY_FILE, cache / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"]


def _read(folder: Path) -> dict[str, list]:
    memory: dict[str, list] = {}
    for path in reversed(_memories(folder)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(path.read_bytes()) if path.is_file() else {}
            memory |= (
                {name: entry for name, entry in content.items() if _is_entry(entry)}
                if (isinstance(content, dict))
                else {}
            )
    return memory


def _is_entry(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], list) and isinstance(entry[1], str)):
        return False
    return isinstance(entry[2], list) and all(isinstance(number, int) for number in entry[0] + entry[2])


def _write(folder: Path, memory: dict[str, list]) -> None:
    content = json.dumps({name: entry for name, entry in memory.items() if (folder / name).is_file()}) + "\n"
    for path in _memories(folder):
        with contextlib.suppress(OSError):
            write_atomic(path, content)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that hash this folder's files; unlocked where no lock can be made or had."""
    for path in _memories(folder):
        lock = FileLock(f"{path}.lock", timeout=LOCK_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, Timeout, NotImplementedError):
            continue
        try:
            yield
        finally:
            lock.release()
        return
    yield
