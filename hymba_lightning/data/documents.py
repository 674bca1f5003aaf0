"""Reads documents out of files, one at a time: plain text, JSON lines, CSV, Parquet, data sets of the Hugging Face hub.

What cannot be read is left out, named and counted (see skips.py); memory is bounded by the longest document allowed.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, Any, NamedTuple

from hymba_lightning.data import json_lines
from hymba_lightning.data.inputs import CSV_SUFFIXES, JSONL_SUFFIXES, PARQUET_SUFFIXES, InputFile
from hymba_lightning.data.skips import Skips, shown
from hymba_lightning.data.sources import Row, hub_rows, parquet_rows, row_of
from hymba_lightning.data.streams import (
    SourceError,
    Whole,
    bounded_lines,
    is_compressed,
    n_lines,
    read_blocks,
    whole_members,
)
from hymba_lightning.text import SURROGATES

# A longer line or row is left out, a longer text file is cut: what one document takes bounds the memory.
MAX_DOCUMENT_BYTES = 1 << 25
TEXT_BLOCK_BYTES = 1 << 22

BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Where a text that is too long for one document is cut, the best place first.
CUTS = ("\n\n", "\n", " ")


class Document(NamedTuple):
    """A text that is tokenized by itself, between two starts of a document."""

    text: str
    utf8: bytes
    """The text in UTF-8, which bits per byte divide by."""
    split: str | None = None
    """"train" or "val", where the user chose; None lets the content decide (`split_rank`)."""


def split_rank(document: Document, seed: int) -> float:
    """A number in [0, 1) that depends on the document's text and the seed alone.

    A document whose number is below the validation fraction is for validation. So equal texts are always on the same
    side, and a document stays on its side whatever other files are prepared with it.
    """
    digest = hashlib.blake2b(document.utf8, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def document_digest(document: Document) -> bytes:
    """16 bytes that are the same for equal texts, and practically never for different ones (BLAKE2b).

    Texts are equal whatever kind of file they lie in: line ends, and white space around them, do not count.
    """
    same = document.utf8.replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip()
    return hashlib.blake2b(same, digest_size=16).digest()


def unescaped(separator: str) -> str:
    r"""A separator as it was typed in a shell, with \n, \t, \r and \\ replaced by what they stand for.

    Line ends of every kind become "\n", as they do in the texts that are cut.
    """
    meant = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    text = re.sub(r"\\([ntr\\])", lambda found: meant[found[1]], separator)
    return text.replace("\r\n", "\n").replace("\r", "\n")


class DocumentReader:
    """Iterates over the documents of files, in the files' order, with one document in memory at a time.

    A document is a text file (its line ends become "\\n", a byte order mark is dropped), or what `separator` cuts out
    of one; a line of a JSON-lines file; a row of a CSV or Parquet file, or of a data set of the hub.

    Args:
        files: What to read.
        text_key: Field of a JSON line, or column, that holds the text.
        separator: Cut text files into documents at this string. None: a file is a document.
        skips: Where what cannot be read is counted; by default a new one.
        max_bytes: Most UTF-8 bytes of a document.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        text_key: str,
        separator: str | None,
        skips: Skips | None = None,
        max_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        self.files = files
        self.text_key = text_key
        self.separator = separator
        self.max_bytes = max_bytes
        # Asked once: a file may vanish before its turn.
        self._sizes = [file.size for file in files]
        self.total_bytes = sum(self._sizes)
        """Size of all files on disk."""
        self.bytes_read = 0
        """Of total_bytes, how much is done."""
        self.skips = Skips() if skips is None else skips
        """What could not be read, and why."""
        self._skips_before_all = self._skips_before = self.skips.state()
        self._file, self._document, self._line = 0, 0, 0
        self._resume_at = (0, 0)
        self._whole: dict[InputFile, Whole] = {}

    def of(self, files: Sequence[InputFile]) -> DocumentReader:
        """A reader of other files with the same settings, which counts what it skips for itself."""
        return DocumentReader(files, self.text_key, self.separator, None, self.max_bytes)

    def position(self) -> dict[str, Any]:
        """Where the iteration stands, as plain values that JSON can hold: `resume` goes on from there."""
        return {"file": self._file, "document": self._document, "skips": self._skips_before}

    def resume(self, position: dict[str, Any]) -> None:
        """Lets the next iteration begin with the document after `position`, with the skips counted until there.

        Documents of the same file that come before it are read again, since files have no index, but not returned.
        """
        self._resume_at = (position["file"], position["document"])
        self.skips.restore(position["skips"])

    def __iter__(self) -> Iterator[Document]:
        """All documents but the empty ones.

        Raises:
            ImportError: A package for this kind of input is not installed.
            UnreadableDatasetError: A data set cannot be read.
            ValueError: With strict skips, something that cannot be read.
        """
        (first_file, first_document), self._resume_at = self._resume_at, (0, 0)
        if first_file == first_document == 0:
            self.skips.restore(self._skips_before_all)
        self.bytes_read = sum(self._sizes[:first_file])
        for index, file in enumerate(self.files[first_file:], start=first_file):
            done_before = self.bytes_read
            to_skip = first_document if index == first_file else 0
            is_empty = True
            self._file, self._document, self._skips_before = index, 0, self.skips.state()
            try:
                for text, share in self._texts(file):
                    document = Document(text, text.encode("utf-8"), file.split)
                    self._document += 1
                    is_empty = is_empty and not document.utf8
                    if self._document <= to_skip:
                        continue
                    self.bytes_read = done_before + int(share * self._sizes[index])
                    if document.utf8:
                        yield document
                if is_empty and self.skips.count == self._skips_before["count"]:
                    self.skips.note("file without a document", shown(file.path))
            except SourceError as error:
                self._skip(file, error.kind, str(error))
            except OSError as error:
                self._skip(file, "cannot be read", error.strerror or str(error))
            self.bytes_read = done_before + self._sizes[index]

    def _texts(self, file: InputFile) -> Iterator[tuple[str, float]]:
        """Documents of one file, and how much of it is read with each."""
        if file.on_hub:
            yield from self._rows(file, hub_rows(file.key, self.text_key, self.max_bytes))
        elif file.is_of(PARQUET_SUFFIXES):
            yield from self._rows(file, parquet_rows(file.path, self.text_key, self.max_bytes))
        else:
            with open(file.path, "rb") as raw:
                read = (
                    self._json_lines
                    if file.is_of(JSONL_SUFFIXES)
                    else self._csv
                    if file.is_of(CSV_SUFFIXES)
                    else self._text_file
                )
                for text in read(file, raw):
                    yield text, (raw.tell() - file.start) / max(file.size, 1)

    def _rows(self, file: InputFile, rows: Iterator[Row]) -> Iterator[tuple[str, float]]:
        for number, row in enumerate(rows, start=1):
            if row.text is None:
                self._skip(file, row.kind, row.cause, f", row {number}")
            else:
                yield row.text, row.share

    def _json_lines(self, file: InputFile, raw: IO[bytes]) -> Iterator[str]:
        number = 0
        for line in self._lines(file, raw):
            number += n_lines(line)
            if line is None:
                self._skip(file, "too long", self._too_long("a line"), f":{number}")
                continue
            if not line.strip():
                continue
            try:
                row = row_of(json_lines.value_of(line, self.text_key), 0.0, self.text_key, self.max_bytes)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "no text"
                self._skip(
                    file, kind, f"no text under {self.text_key!r} ({type(error).__name__}: {error})", f":{number}"
                )
                continue
            if row.text is None:
                self._skip(file, row.kind, row.cause, f":{number}")
            else:
                yield row.text

    def _lines(self, file: InputFile, raw: IO[bytes]) -> Iterator[bytes | None]:
        if is_compressed(file.path) and file not in self._whole:
            self._whole[file] = whole_members(file.path, raw)
        for number, line in enumerate(
            bounded_lines(read_blocks(file.path, raw, self._whole.get(file)), self.max_bytes), start=1
        ):
            if number == 1 and line is not None:
                if line.startswith(WIDE_BOMS):
                    raise SourceError("not UTF-8", "not UTF-8 text but UTF-16 or UTF-32; convert it")
                line = line.removeprefix(BOM)
            yield line

    def _csv(self, file: InputFile, raw: IO[bytes]) -> Iterator[str]:
        delimiter = "\t" if ".tsv" in file.path.name.lower() else ","
        rows = csv.reader(self._csv_lines(file, raw), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            # The limit is the whole process's, and others read CSV too.
            before = csv.field_size_limit(self.max_bytes)
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                self._skip(file, "damaged CSV", f"no row of CSV ({error})", f":{self._line}")
                if not header or "field larger" in str(error) or "end of data" in str(error):
                    return
                continue
            finally:
                csv.field_size_limit(before)
            if not row:
                continue
            kind, cause = _damage(row)
            if kind and not header:
                raise SourceError(kind, f"the header: {cause}")
            if kind:
                self._skip(file, kind, cause, f":{self._line}")
            elif not header:
                header = row
                if header.count(self.text_key) != 1:
                    raise SourceError("no text column", _columns(header, self.text_key, delimiter))
            elif len(row) != len(header):
                self._skip(file, "damaged CSV", f"{len(row)} fields, not {len(header)}", f":{self._line}")
            else:
                yield row[header.index(self.text_key)]

    def _csv_lines(self, file: InputFile, raw: IO[bytes]) -> Iterator[str]:
        self._line = 0
        for line in self._lines(file, raw):
            self._line += n_lines(line)
            if line is None:
                raise SourceError(
                    "too long", f"line {self._line}: {self._too_long('a line')}; the lines after it are left out, too"
                )
            # A field that is no text costs its row, not the rows after it.
            text = line.decode("utf-8", "surrogateescape")
            yield text.removesuffix("\r").replace("\r\n", "\n") + "\n"

    def _text_file(self, file: InputFile, raw: IO[bytes]) -> Iterator[str]:
        raw.seek(file.start)
        # One that fits is decoded as a whole before anything of it is given.
        size = file.size
        fits = size <= self.max_bytes
        rest, n_cut = "", 0
        for text in _decoded_blocks([raw.read(size)] if fits else _range(raw, size), fits):
            rest += text
            if self.separator is not None:
                *whole, rest = rest.split(self.separator)
                yield from whole
            while 4 * len(rest) > self.max_bytes and len(rest.encode("utf-8")) > self.max_bytes:
                end = _cut_place(rest, self.max_bytes // 4)
                n_cut += 1
                yield rest[:end]
                rest = rest[end:]
        yield rest
        if n_cut:
            self.skips.note(
                "file with a document longer than max_document_bytes, cut into several",
                f"{shown(file.path)}: {n_cut:,} cuts",
            )

    def _too_long(self, what: str) -> str:
        return f"{what} longer than {self.max_bytes:,} bytes; raise max_document_bytes to keep it"

    def _skip(self, file: InputFile, kind: str, cause: str, place: str = "") -> None:
        self.skips.add(kind, lambda: f"{shown(file.path)}{place}: {cause}")


def _range(raw: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (block := raw.read(min(TEXT_BLOCK_BYTES, size))):
        size -= len(block)
        yield block


def _decoded_blocks(blocks: Iterable[bytes], whole: bool) -> Iterator[str]:
    """UTF-8 → text with "\\n" for every kind of line end.

    Args:
        blocks: The text's bytes.
        whole: There is one block only.

    Raises:
        SourceError: It is no UTF-8 text; what came before has been given.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    n_bytes = 0
    for block in chain(blocks, () if whole else [b""]):
        if n_bytes == 0 and block.startswith(WIDE_BOMS):
            raise SourceError("not UTF-8", "not UTF-8 text but UTF-16 or UTF-32; convert it")
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=whole or not block)
        except UnicodeDecodeError as error:
            raise SourceError(
                "not UTF-8", f"not UTF-8 text ({error.reason} at byte {n_bytes - kept + error.start})"
            ) from error
        if "\0" in text:
            raise SourceError("NUL bytes", "it holds NUL bytes: a damaged file, or no text")
        text = text.removeprefix("\ufeff") if n_bytes == 0 else text
        n_bytes += len(block)
        yield newlines.decode(text, final=whole or not block)


def _damage(row: list[str]) -> tuple[str, str]:
    """What is wrong with the fields of a CSV row that are no text, as (kind, cause); both empty where all are."""
    if any("\0" in field for field in row):
        return "NUL bytes", "it holds NUL bytes: a damaged file, or no text"
    if not all(field.isascii() or SURROGATES.search(field) is None for field in row):
        return "not UTF-8", "not UTF-8 text"
    return "", ""


def _columns(header: list[str], text_key: str, delimiter: str) -> str:
    """Why none of these columns is the text's, and what to do."""
    if text_key in header:
        return f"{header.count(text_key)} columns {text_key!r}; give all but the text's another name"
    other = next((sign for sign in ",;\t|" if text_key in header[0].split(sign)), None)
    if len(header) == 1 and other is not None and other != delimiter:
        return f"its columns are cut by {other!r}, not by {delimiter!r}; write it anew with {delimiter!r}"
    return f"no column {text_key!r} among {', '.join(header[:20])}; set text_key"


def _cut_place(text: str, most: int) -> int:
    """Where to end a document of at most `most` characters: after a paragraph, a line, a word, or anywhere."""
    for cut in CUTS:
        found = text.rfind(cut, most // 2, most)
        if found >= 0:
            return found + len(cut)
    return most
