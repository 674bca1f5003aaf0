"""Files and folders → documents: which files, in which order, and the text of each, a document at a time."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from hymba_lightning.data.sources import (
    HUB_PREFIX,
    PARQUET_SUFFIXES,
    Row,
    UnreadableSourceError,
    hub_rows,
    parquet_rows,
)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN_SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
PYTHON_STDLIB = "python_stdlib"

# Never documents: caches, installed packages, version control (any hidden folder).
EXCLUDED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules", ".*")
# The standard library's tests are half of it, much of that generated or encoding puzzles.
STDLIB_EXCLUDED_FOLDERS = ("test", "tests", "idle_test")


class InputFile(NamedTuple):
    """A file of documents, or a Hugging Face data set (whose path is its name, hf:…)."""

    path: Path
    key: str
    """Name that does not depend on where the input folder lies; orders the files."""

    @property
    def on_hub(self) -> bool:
        """It is no file."""
        return self.key.startswith(HUB_PREFIX)

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for a data set."""
        return 0 if self.on_hub else self.path.stat().st_size

    @property
    def stamp(self) -> str:
        """Changes when the file is replaced or modified; a data set's is its name."""
        if self.on_hub:
            return self.key
        stat = self.path.stat()
        return f"{self.key}\0{stat.st_size}\0{stat.st_mtime_ns}"


class Document(NamedTuple):
    """A document's text."""

    text: str
    utf8: bytes


def find_inputs(inputs: Sequence[str], exclude: Sequence[str], seed: int, out: Path) -> list[InputFile]:
    """Files to read, in an order drawn from the seed and their names (neighbours in a folder are alike).

    Args:
        inputs: Files, folders (searched recursively), glob patterns, hf:NAME (see `hub_rows`), or "python_stdlib".
        exclude: Names or patterns of folders and files to leave out when a folder is searched.
        seed: Of the order.
        out: Folder that is being written; nothing below it is read.

    Raises:
        FileNotFoundError: An input matches no file of a known kind.
        ValueError: A named file is of no known kind.
    """
    found: dict[Path, InputFile] = {}
    for given in inputs:
        if given.startswith(HUB_PREFIX):
            found.setdefault(Path(given), InputFile(Path(given), given))
            continue
        files = list(_expand(given, exclude))
        known = ", ".join(KNOWN_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"input {given!r} matches no file; inputs are files, folders or globs of {known}")
        for file in files:
            if not file.path.name.lower().endswith(KNOWN_SUFFIXES):
                raise ValueError(f"{file.path} is of no known kind ({known}); rename it or leave it out")
            if out.resolve() not in file.path.resolve().parents:
                found.setdefault(file.path.resolve(), file)
    return sorted(found.values(), key=lambda file: (_digest(f"{seed}/{file.key}".encode()), file.key))


def split_rank(document: Document, seed: int) -> float:
    """A number in [0, 1) drawn from the document's content and the seed.

    Documents of a rank below the validation fraction are for validation: equal texts are always on the same side, and
    more documents or other files around change nothing.
    """
    digest = hashlib.blake2b(document.utf8, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


class DocumentReader:
    """Iterates over the documents of files, one in memory at a time.

    Args:
        files: What to read: a text file is one document, a line of a JSON-lines file another.
        text_key: Field of a JSON line that holds the text.
        separator: Cut text files into documents at this string. None: a file is a document.
        strict: Raise at the first file or line that cannot be read instead of skipping it.
    """

    def __init__(self, files: Sequence[InputFile], text_key: str, separator: str | None, strict: bool) -> None:
        self.files = files
        self.text_key = text_key
        self.separator = separator
        self.strict = strict
        self.total_bytes = sum(file.size for file in files)
        """Size of all files on disk."""
        self.bytes_read = 0
        """Of total_bytes, how much is done."""
        self.skipped: list[str] = []
        """What could not be read, and why."""
        self._file, self._document, self._skipped_before = 0, 0, 0
        self._resume_at = (0, 0)

    def position(self) -> dict[str, Any]:
        """Plain values from which `resume` goes on with the next document."""
        return {"file": self._file, "document": self._document, "skipped": self.skipped[:self._skipped_before]}

    def resume(self, position: dict[str, Any]) -> None:
        """Let the next iteration begin after `position`. What comes before in the same file is read, not returned."""
        self._resume_at = (position["file"], position["document"])
        self.skipped = list(position["skipped"])

    def __iter__(self) -> Iterator[Document]:
        """Documents that are not empty.

        Raises:
            ImportError: A package for this kind of input is not installed.
            ValueError: With strict, something that is not UTF-8 text or not a JSON line with text in it.
        """
        (first_file, first_document), self._resume_at = self._resume_at, (0, 0)
        if first_file == first_document == 0:
            self.skipped = []
        self.bytes_read = sum(file.size for file in self.files[:first_file])
        for index, file in enumerate(self.files[first_file:], start=first_file):
            done_before = self.bytes_read
            to_skip = first_document if index == first_file else 0
            self._file, self._document, self._skipped_before = index, 0, len(self.skipped)
            try:
                for document, share in self._documents(file):
                    self._document += 1
                    if self._document <= to_skip:
                        continue
                    self.bytes_read = done_before + int(share * file.size)
                    if document.utf8:
                        yield document
            except (OSError, EOFError, zstandard.ZstdError, UnreadableSourceError) as error:
                self._skip(f"{file.path}: {error}")
            self.bytes_read = done_before + file.size

    def _documents(self, file: InputFile) -> Iterator[tuple[Document, float]]:
        """Documents of one file, and how much of it is read with each."""
        if file.on_hub or file.path.name.lower().endswith(PARQUET_SUFFIXES):
            rows = hub_rows(file.key, self.text_key) if file.on_hub else parquet_rows(file.path, self.text_key)
            yield from self._rows(file, rows)
            return
        with open(file.path, "rb") as raw:
            texts = self._lines(file.path, raw) if _is_jsonl(file.path) else self._text_file(file.path, raw)
            for document in texts:
                yield document, raw.tell() / max(file.size, 1)

    def _rows(self, file: InputFile, rows: Iterator[Row]) -> Iterator[tuple[Document, float]]:
        for number, row in enumerate(rows, start=1):
            try:
                document = Document(row.text, row.text.encode("utf-8"))
            except (AttributeError, UnicodeEncodeError) as error:
                self._skip(f"{file.path}, row {number}: no text under {self.text_key!r} ({error})")
            else:
                yield document, row.share

    def _text_file(self, path: Path, raw: IO[bytes]) -> Iterator[Document]:
        content = raw.read()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            self._skip(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
            return
        if self.separator is None:
            yield Document(text, content)
        else:
            for part in text.split(self.separator):
                yield Document(part, part.encode())

    def _lines(self, path: Path, raw: IO[bytes]) -> Iterator[Document]:
        for number, line in enumerate(_decompressed(path, raw), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.text_key]
                document = Document(text, text.encode("utf-8"))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                self._skip(f"{path}:{number}: no text under {self.text_key!r} ({type(error).__name__}: {error})")
            else:
                yield document

    def _skip(self, what: str) -> None:
        if self.strict:
            raise ValueError(f"{what}; leave it out, or prepare without strict to skip what cannot be read")
        self.skipped.append(what)


def _expand(given: str, exclude: Sequence[str]) -> Iterator[InputFile]:
    if given == PYTHON_STDLIB and not os.path.exists(given):
        stdlib = Path(sysconfig.get_path("stdlib"))
        yield from _walk(stdlib, (*exclude, *STDLIB_EXCLUDED_FOLDERS), (".py",))
        return
    matches = [given] if os.path.exists(given) else glob.glob(os.path.expanduser(given), recursive=True)
    for match in sorted(matches):
        path = Path(match)
        if path.is_dir():
            yield from _walk(path, exclude, KNOWN_SUFFIXES)
        else:
            yield InputFile(path, path.name)


def _walk(root: Path, exclude: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[InputFile]:
    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in exclude)

    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not excluded(name))
        for name in sorted(names):
            path = Path(folder, name)
            if name.lower().endswith(suffixes) and not excluded(name) and path.is_file():
                yield InputFile(path, path.relative_to(root).as_posix())


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().endswith(JSONL_SUFFIXES)


def _decompressed(path: Path, raw: IO[bytes]) -> Iterable[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)
    if path.suffix.lower() == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(reader, 1 << 20)
    return raw


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
