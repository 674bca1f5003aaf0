"""Bytes of plain and compressed files in blocks, and lines, with memory bounded whatever the file holds."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

BLOCK_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB: what is fed at once bounds what comes out, here by 32 MiB.
ZSTD_FEED_BYTES = 1 << 10
GZIP_FEED_BYTES = 1 << 16
# Empty lines in a row are one item where a block has so many of them.
MANY_EMPTY = (b"\n" * 64, b"\r\n" * 64)
EMPTY_LINES = re.compile(rb"\n([\r\n]{62,}\n)")
# What a zstd file may ask for that is not given: part of the library's error, and what to do.
ZSTD_OPTIONS = (
    (
        "too much memory",
        "zstd window too large",
        "decompress it with `zstd -d --long=31`, and compress it without --long",
    ),
    ("Dictionary mismatch", "zstd dictionary needed", "decompress it with its dictionary first"),
)


class SourceError(ValueError):
    """A file, or the rest of it, cannot be read.

    Args:
        kind: As `Skips.add` takes it.
        cause: The sentence.
    """

    def __init__(self, kind: str, cause: str) -> None:
        super().__init__(cause)
        self.kind = kind


class Whole(NamedTuple):
    """How much of a compressed file can be trusted."""

    n_bytes: int
    """Content of the members (frames) that are whole and whose checksums, where they have any, are right."""
    error: SourceError | None
    """What is the matter with the rest; None where there is none."""


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, by its suffix: .gz or .zst."""
    return path.suffix.lower() in _MEMBERS


def whole_members(path: Path, raw: IO[bytes]) -> Whole:
    """Decompresses an open file from its start to its end, keeping nothing; about a gigabyte of content a second.

    What a damaged stream gives before the damage shows may be wrong already: the checksum comes last.
    """
    n_bytes = n_whole = 0
    try:
        for block in _MEMBERS[path.suffix.lower()](raw):
            if block is None:
                n_whole = n_bytes
            else:
                n_bytes += len(block)
    except SourceError as error:
        read = f"the {n_whole:,} bytes of its whole members are read" if n_whole else "nothing of it is read"
        return Whole(n_whole, SourceError(error.kind, f"{error}; {read}"))
    return Whole(n_whole, None)


def read_blocks(path: Path, raw: IO[bytes], whole: Whole | None = None) -> Iterator[bytes]:
    """The content of an open file, decompressed by its name (.gz, .zst: all members, all frames), in blocks.

    Args:
        path: Its name.
        raw: The file, read from its start where it is compressed.
        whole: What `whole_members` said of it before, so that it need not be asked again.

    Raises:
        SourceError: It ends early, or its compression is damaged; the members that are whole have been given.
    """
    if not is_compressed(path):
        yield from iter(lambda: raw.read(BLOCK_BYTES), b"")
        return
    if whole is None:
        raw.seek(0)
        whole = whole_members(path, raw)
    raw.seek(0)
    left = whole.n_bytes
    for block in _MEMBERS[path.suffix.lower()](raw) if left else ():
        if block:
            yield block[:left]
            left -= len(block)
        if left <= 0:
            break
    if left > 0:
        raise SourceError("changed while it was read", "it was changed while it was read; prepare again")
    if whole.error is not None:
        raise whole.error


def bounded_lines(blocks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their "\\n"; None in the place of one of more than `limit` bytes, which is not kept.

    Many empty lines in a row are given as one item, with the line ends between them (`n_lines` counts them).
    """
    rest, too_long = bytearray(), False
    for block in blocks:
        if too_long and b"\n" not in block:
            continue
        has_runs = any(many in block for many in MANY_EMPTY)
        *ended, last = _lines_of(block) if has_runs else block.split(b"\n")
        for end in ended:
            if has_runs and b"\n" in end:
                yield end
                continue
            line = bytes(rest) + end if rest else end
            yield None if too_long or len(line) > limit else line
            rest.clear()
            too_long = False
        if not too_long:
            rest += last
            if len(rest) > limit:
                rest, too_long = bytearray(), True
    if rest or too_long:
        yield None if too_long else bytes(rest)


def n_lines(line: bytes | None) -> int:
    """How many lines an item of `bounded_lines` stands for."""
    # Empty lines in a row begin with a line end: longer lines are not searched.
    return 1 + line.count(b"\n") if line and line.startswith((b"\n", b"\r")) else 1


def _lines_of(block: bytes) -> list[bytes]:
    """Splits a block into lines; many empty lines in a row become one item."""
    lines: list[bytes] = []
    start = 0
    for run in EMPTY_LINES.finditer(block):
        lines += block[start : run.start()].split(b"\n")
        lines.append(run[1].removesuffix(b"\n"))
        start = run.end()
    return lines + block[start:].split(b"\n")


def _gzip_members(raw: IO[bytes]) -> Iterator[bytes | None]:
    """Blocks of content, None at the end of each whole member. Raises SourceError."""
    n_bytes, member, n_members = 0, None, 0
    try:
        while fed := raw.read(GZIP_FEED_BYTES):
            while fed:
                if member is None:
                    # Members may be followed by zeros.
                    fed = fed.lstrip(b"\0") if n_members else fed
                    if not fed:
                        break
                    member, n_members = zlib.decompressobj(wbits=31), n_members + 1
                content = member.decompress(fed, BLOCK_BYTES)
                n_bytes += len(content)
                if content:
                    yield content
                fed = member.unconsumed_tail
                if member.eof:
                    yield None
                    fed, member = member.unused_data, None
    except zlib.error as error:
        cause = " ".join(str(error).split())
        raise SourceError(
            "corrupt compression",
            f"the gzip stream is damaged after {n_bytes:,} bytes of content ({cause}); copy it again",
        ) from error
    if member is not None or n_members == 0:
        raise SourceError(
            "truncated", f"truncated: the gzip stream ends early, after {n_bytes:,} bytes of content; copy it again"
        )


def _zstd_members(raw: IO[bytes]) -> Iterator[bytes | None]:
    """Blocks of content, None at the end of each whole frame. Raises SourceError."""
    n_bytes, frame, n_frames = 0, None, 0
    decompressor = zstandard.ZstdDecompressor()
    try:
        while fed := raw.read(ZSTD_FEED_BYTES):
            while fed:
                if frame is None:
                    frame, n_frames = decompressor.decompressobj(), n_frames + 1
                content = frame.decompress(fed)
                n_bytes += len(content)
                if content:
                    yield content
                fed = b""
                if frame.eof:
                    yield None
                    fed, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        cause = str(error).removeprefix("zstd decompressor error: ").removeprefix("zstd decompress error: ")
        for sign, kind, remedy in ZSTD_OPTIONS:
            if sign in cause:
                raise SourceError(kind, f"{cause}: {remedy}") from error
        raise SourceError(
            "corrupt compression",
            f"the zstd stream is damaged after {n_bytes:,} bytes of content ({cause}); copy it again",
        ) from error
    if frame is not None or n_frames == 0:
        raise SourceError(
            "truncated", f"truncated: the zstd stream ends early, after {n_bytes:,} bytes of content; copy it again"
        )


_MEMBERS = {".gz": _gzip_members, ".zst": _zstd_members}
