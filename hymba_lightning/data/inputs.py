"""What to read: files of folders, patterns and data sets, in an order of their names, and what is left out of them."""

from __future__ import annotations

import filecmp
import fnmatch
import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hymba_lightning.data.paths import find_paths
from hymba_lightning.data.skips import Skips, shown
from hymba_lightning.data.sources import HUB_PREFIX, PARQUET_SUFFIXES

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CSV_SUFFIXES = (".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst")
KNOWN_SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + CSV_SUFFIXES + PARQUET_SUFFIXES
PYTHON_STDLIB = "python_stdlib"

# Never documents: caches, installed packages, version control (any hidden folder).
EXCLUDED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules", ".*")
# The standard library's tests are half of it, much of that generated or encoding puzzles.
STDLIB_EXCLUDED_FOLDERS = ("test", "tests", "idle_test")

# How far from its place the cut between training and validation may lie.
CUT_WINDOW_BYTES = 1 << 16
COMPARED_BYTES = 1 << 14


class InputFile(NamedTuple):
    """A file of documents, or a part of one, or a Hugging Face data set (whose path is its name, hf:…)."""

    path: Path
    key: str
    """Name that does not depend on where the input folder lies; orders the files."""
    split: str | None = None
    """All its documents' split; None where their content decides."""
    start: int = 0
    """First byte to read."""
    stop: int | None = None
    """Byte to end before; None for the file's end."""

    @property
    def on_hub(self) -> bool:
        """It is no file."""
        return self.key.startswith(HUB_PREFIX)

    @property
    def size(self) -> int:
        """Bytes to read; 0 for a data set."""
        if self.on_hub:
            return 0
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start

    @property
    def stamp(self) -> str:
        """Changes when the file is replaced or modified, or read for another split; a data set's is its name."""
        fixed = "" if self.split is None else f"\0{self.split}\0{self.start}"
        if self.on_hub:
            return self.key + fixed
        status = self.path.stat()
        return f"{self.key}\0{status.st_size}\0{status.st_mtime_ns}{fixed}"

    def is_of(self, suffixes: tuple[str, ...]) -> bool:
        """Whether its name ends with one of them."""
        return not self.on_hub and self.path.name.lower().endswith(suffixes)


class _LeftOut:
    """Paths that are not read, counted once however many inputs lead to them."""

    def __init__(self, skips: Skips) -> None:
        self.skips = skips
        self._told: set[str] = set()

    def add(self, kind: str, path: str | Path, why: str = "") -> None:
        place = os.path.realpath(path)
        if place not in self._told:
            self._told.add(place)
            self.skips.add(kind, f"{shown(path)}: {why}" if why else shown(path))


def find_inputs(
    inputs: Sequence[str], exclude: Sequence[str], seed: int, out: Path, skips: Skips | None = None
) -> list[InputFile]:
    """Files to read, in an order drawn from the seed and their names (neighbours in a folder are alike).

    Args:
        inputs: Files, folders (searched recursively, links to folders followed), glob patterns where no such path
            exists, hf:NAME (see `hub_rows`), or "python_stdlib".
        exclude: Names or patterns of folders and files to leave out when a folder is searched.
        seed: Of the order.
        out: Folder that is being written; nothing below it is read.
        skips: Where files that cannot be read are counted.

    Raises:
        FileNotFoundError: An input matches no file of a known kind.
        ValueError: A named file is of no known kind.
    """
    left_out = _LeftOut(Skips() if skips is None else skips)
    found: dict[Path, InputFile] = {}
    target = out.resolve()
    known = ", ".join(KNOWN_SUFFIXES)
    if not inputs or not all(inputs):
        # An empty path would be the current folder: what a shell makes of a variable that is not set.
        raise ValueError("an input is empty, or there is none; name files, folders or patterns to read")
    for given in inputs:
        if given.startswith(HUB_PREFIX):
            found.setdefault(Path(given), InputFile(Path(given), given))
            continue
        files = list(_expand(given, exclude, target, left_out))
        if not files:
            kinds = "; ".join(
                f"{entry['count']:,} × {kind}: {entry['first'][0]}"
                for kind, entry in left_out.skips.state()["kinds"].items()
            )
            raise FileNotFoundError(
                f"input {given!r} matches no file that can be read"
                + (f" ({kinds})" if kinds else "")
                + f"; inputs are files, folders or globs of {known}"
            )
        for file in files:
            if not file.is_of(KNOWN_SUFFIXES):
                raise ValueError(f"{shown(file.path)} is of no known kind ({known}); rename it or leave it out")
        resolved = {file.path.resolve(): file for file in reversed(files)}
        outside = {place: file for place, file in resolved.items() if target not in place.parents}
        if not outside:
            raise ValueError(
                f"input {given!r} lies in out={out}, of which nothing is read; choose another folder for out"
            )
        found = outside | found
    return sorted(found.values(), key=lambda file: (_digest(f"{seed}/{file.key}".encode()), file.key))


def apart(train: list[InputFile], val: list[InputFile]) -> list[InputFile]:
    """Files of the two splits as one list.

    Raises:
        ValueError: A file, by whatever name, or an equal one, is among both.
    """
    both = first_common(*([file.path for file in files if not file.on_hub] for files in (train, val)))
    on_hub = {file.key for file in train if file.on_hub} & {file.key for file in val if file.on_hub}
    if both or on_hub:
        one, other = [shown(path) for path in both] if both else 2 * [min(on_hub)]
        raise ValueError(
            f"{one}, among inputs, is the same as {other}, among val_inputs; training on validation text "
            "makes its score worthless: leave it out of one"
        )
    return [*(file._replace(split="val") for file in val), *(file._replace(split="train") for file in train)]


def first_common(ours: Sequence[Path], theirs: Sequence[Path]) -> tuple[Path, Path] | None:
    """A file of each that are one file (by any path or link), or of equal content; None where there are none."""
    by_place: dict[tuple[int, int], Path] = {}
    by_size: dict[int, list[Path]] = {}
    for path in theirs:
        status = path.stat()
        by_place[status.st_dev, status.st_ino] = path
        by_size.setdefault(status.st_size, []).append(path)
    for path in ours:
        status = path.stat()
        same = by_place.get((status.st_dev, status.st_ino))
        for other in [same] if same else by_size.get(status.st_size, []):
            if other is same or (status.st_size and _equal(path, other, status.st_size)):
                return path, other
    return None


def _equal(one: Path, other: Path, size: int) -> bool:
    """Whether two files of one size have equal content; most that differ do so in one of three places."""
    with open(one, "rb") as first, open(other, "rb") as second:
        for place in (0, size // 2, max(size - COMPARED_BYTES, 0)):
            first.seek(place)
            second.seek(place)
            if first.read(COMPARED_BYTES) != second.read(COMPARED_BYTES):
                return False
    return filecmp.cmp(one, other, shallow=False)


def head_and_tail(file: InputFile, val_fraction: float) -> list[InputFile]:
    """A text file as two: its end, of about `val_fraction` of the bytes, for validation and the rest for training.

    They part at the paragraph's end nearest to that place, or at a line's, a word's, a character's.
    """
    size = file.size
    place = min(max(round(size * (1 - val_fraction)), 1), max(size - 1, 1))
    first = max(place - CUT_WINDOW_BYTES, 0)
    with open(file.path, "rb") as raw:
        raw.seek(first)
        window = raw.read(place + CUT_WINDOW_BYTES - first)
    for pattern in (rb"\n\s*\n", rb"\n", b" ", rb"[\x00-\x7f\xc0-\xff]"):
        starts = pattern.startswith(b"[")
        ends = [first + (found.start() if starts else found.end()) for found in re.finditer(pattern, window)]
        inside = [end for end in ends if 0 < end < size]
        if inside:
            cut = min(inside, key=lambda end: abs(end - place))
            return [file._replace(split="train", stop=cut), file._replace(split="val", start=cut, stop=size)]
    return [file]


def _expand(given: str, exclude: Sequence[str], out: Path, skips: _LeftOut) -> Iterator[InputFile]:
    if given == PYTHON_STDLIB and not os.path.exists(given):
        stdlib = Path(sysconfig.get_path("stdlib"))
        yield from _walk(stdlib, (*exclude, *STDLIB_EXCLUDED_FOLDERS), (".py",), out, None)
        return
    for path in find_paths(given):
        if path.is_dir():
            yield from _walk(path, exclude, KNOWN_SUFFIXES, out, skips)
        elif _can_be_read(path, skips):
            yield InputFile(path, path.name)


def _walk(
    root: Path, exclude: Sequence[str], suffixes: tuple[str, ...], out: Path, skips: _LeftOut | None
) -> Iterator[InputFile]:
    """Files below `root`. A folder that links lead to more than once is searched once. None counts nothing."""

    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in exclude)

    def unreadable(error: OSError) -> None:
        if skips is not None:
            skips.add("cannot be opened", error.filename, str(error.strerror))

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen or Path(folder).resolve() == out:
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        # Folders before links to them, so that a file's key is that of its own place.
        folders[:] = sorted(
            (name for name in folders if not excluded(name)),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        for name in sorted(names):
            path = Path(folder, name)
            if excluded(name):
                continue
            if not name.lower().endswith(suffixes):
                if skips is not None:
                    skips.add(_unknown_kind(path), path)
            elif skips is None or _can_be_read(path, skips):
                yield InputFile(path, path.relative_to(root).as_posix())


def _can_be_read(path: Path, skips: _LeftOut) -> bool:
    try:
        os.fspath(path).encode()
        status = path.stat()
    except UnicodeEncodeError:
        skips.add("file name is not UTF-8", path, "its name is not UTF-8; rename it")
        return False
    except OSError as error:
        skips.add("cannot be opened", path, str(error.strerror))
        return False
    if not stat.S_ISREG(status.st_mode):
        skips.add("not a file", path, "a pipe, socket or device")
        return False
    return True


def _unknown_kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return f"{shown(suffix)} file, which is not read" if suffix else "file without a suffix, which is not read"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
