"""The forms of text that `prepare` takes, for `fuzz`. What is read without a skip must be what the file says."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO

import zstandard

from hymba_lightning.data.documents import DocumentReader
from hymba_lightning.data.inputs import InputFile
from hymba_lightning.data.parquet import answer
from hymba_lightning.data.sources import answered_rows
from hymba_lightning.data.streams import SourceError
from hymba_lightning.studies.fuzz import Format, NotTriedError, Reading, damage

TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(40)) for number in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
LIMIT = 1 << 25


class SkippedError(Exception):
    """Something of an input was left out, as a preparation says it."""


def text() -> Format:
    """A text file: no document, or the text that its bytes are."""

    def says(content: bytes) -> list[str]:
        decoded = content.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").replace("\r", "\n")
        return [decoded] if decoded else []

    whole = "\n".join(TEXTS)
    return Format("text", _writes(whole.encode()), damage, _reads_texts(says, [whole]), (SkippedError,), "a.txt")


def jsonl() -> Format:
    """JSON lines: every line is the text that it says, or skipped."""
    return Format("jsonl", _writes(LINES), damage, _reads_texts(_says_lines), (SkippedError,), "a.jsonl")


def csv_rows() -> Format:
    """A CSV file: without a skip, what Python's reader of the whole file says."""
    rows = io.StringIO()
    csv.writer(rows).writerows([["id", "text"], *([index, f'{text}, "x"'] for index, text in enumerate(TEXTS))])

    def says(content: bytes) -> list[str]:
        lines = io.StringIO(content.removeprefix(b"\xef\xbb\xbf").decode(), newline="")
        header, *rows = [row for row in csv.reader(lines, strict=True) if row]
        texts = [row[header.index("text")].replace("\r\n", "\n") for row in rows]
        return [text for text in texts if text]

    written = [f'{text}, "x"' for text in TEXTS]
    return Format(
        "csv", _writes(rows.getvalue().encode()), damage, _reads_texts(says, written), (SkippedError,), "a.csv"
    )


def gzipped() -> Format:
    """JSON lines in two gzip members, which have checksums: a text that was not written is wrong."""

    def says(content: bytes) -> list[str]:
        return _says_lines(gzip.decompress(content))

    half = len(LINES) // 2
    packed = gzip.compress(LINES[:half], mtime=0) + gzip.compress(LINES[half:], mtime=0)
    return Format("jsonl.gz", _writes(packed), damage, _reads_texts(says, checked=True), (SkippedError,), "a.jsonl.gz")


def zstd() -> Format:
    """JSON lines in two zstd frames with checksums, as the command `zstd` writes them."""
    half, packer = len(LINES) // 2, zstandard.ZstdCompressor(write_checksum=True)
    packed = packer.compress(LINES[:half]) + packer.compress(LINES[half:])
    return Format(
        "jsonl.zst", _writes(packed), damage, _reads_texts(_says_zstd, checked=True), (SkippedError,), "a.jsonl.zst"
    )


def zstd_unchecked() -> Format:
    """JSON lines in a zstd frame without a checksum: what its content says."""

    packed = zstandard.compress(LINES)
    return Format(
        "jsonl.zst without checksum", _writes(packed), damage, _reads_texts(_says_zstd), (SkippedError,), "a.jsonl.zst"
    )


def parquet() -> Format:
    """A Parquet file whose pages have checksums: anything but what was written is wrong."""
    return _parquet("parquet with page checksums", checked=True)


def parquet_unchecked() -> Format:
    """A Parquet file without them, as most writers leave it: valid pages are what they say."""
    return _parquet("parquet without page checksums", checked=False)


def _writes(content: bytes) -> Callable[[Path], bytes]:
    def make(path: Path) -> bytes:
        path.write_bytes(content)
        return content

    return make


def _says_lines(content: bytes) -> list[str]:
    """Texts of the lines that have one. Raises where a line has none, as a preparation would skip it."""
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    texts = [json.loads(line.decode())["text"] for line in lines]
    if not all(isinstance(text, str) and text.encode() is not None for text in texts):
        raise TypeError("no text")
    return [text for text in texts if text]


def _says_zstd(content: bytes) -> list[str]:
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        return _says_lines(reader.read())


def _reads_texts(
    says: Callable[[bytes], list[str]], written: list[str] = TEXTS, checked: bool = False
) -> Callable[[Path, bytes], Reading]:
    """A reader that reads texts as `prepare` does, and judges what it got.

    Args:
        says: The texts of a file, by another reader, which may raise.
        written: Those of the true file.
        checked: The file has checksums, so that no other text may be read. (Whole members may be lost or swapped.)
    """

    def read(path: Path, content: bytes) -> Reading:
        reader = DocumentReader([InputFile(path, path.name)], "text", None)
        texts = [document.text for document in reader]
        skipped = reader.skips.state()
        if checked and not set(texts) <= set(written):
            return Reading.WRONG
        if skipped["count"]:
            raise SkippedError(skipped["first"][0])
        if texts == written:
            return Reading.RIGHT
        try:
            return Reading.OTHER if texts == says(content) else Reading.WRONG
        except (ValueError, LookupError, TypeError, RecursionError, csv.Error, zstandard.ZstdError):
            return Reading.WRONG

    return read


def _parquet(name: str, checked: bool) -> Format:
    try:
        arrow, tables = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise NotTriedError('pyarrow is not installed: pip install "hymba-lightning[data]"') from error

    def make(path: Path) -> bytes:
        tables.write_table(arrow.table({"text": TEXTS}), path, row_group_size=15, write_page_checksum=checked)
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        texts, skipped = _parquet_texts(path)
        if checked and not set(texts) <= set(TEXTS):
            return Reading.WRONG
        if skipped:
            raise SkippedError(f"{path.name}: {skipped}")
        if texts == TEXTS:
            return Reading.RIGHT
        return Reading.OTHER if not checked and texts == _whole_column(path, tables) else Reading.WRONG

    return Format(name, make, damage, read, (SkippedError,), "a.parquet")


def _parquet_texts(path: Path) -> tuple[list[str], str]:
    """What `answer` gives of the file, and why not more."""
    texts, skipped = [], ""
    with _forked(partial(answer, str(path), "text", LIMIT)) as (answers, ended):
        try:
            for row in answered_rows(answers, ended):
                if row.text is None:
                    skipped = skipped or row.cause
                elif row.text:
                    texts.append(row.text)
        except SourceError as error:
            skipped = str(error)
    return texts, skipped


def _whole_column(path: Path, tables: ModuleType) -> list[str]:
    """The column as pyarrow reads it at once."""

    def read(answers: IO[bytes]) -> None:
        pickle.dump(tables.read_table(path, columns=["text"], use_threads=False)["text"].to_pylist(), answers)

    with _forked(read) as (answers, _):
        texts = [text.decode() if isinstance(text, bytes) else text for text in pickle.load(answers)]
    return [text for text in texts if text]


@contextlib.contextmanager
def _forked(write: Callable[[IO[bytes]], None]) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """A copy of this process that writes and ends, however: what it writes, and a wait for its status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as answers:
                write(answers)
        finally:
            os._exit(0)
    os.close(writing)
    statuses: list[int] = []

    def ended() -> int:
        if not statuses:
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return statuses[0]

    with os.fdopen(reading, "rb") as answered:
        try:
            yield answered, ended
        finally:
            answered.close()
            ended()
