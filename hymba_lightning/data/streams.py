"""Bytes of plain and compressed files in blocks, and lines, with memory bounded whatever the file holds."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import zstandard

BLOCK_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB: what is fed at once bounds what comes out, here by 32 MiB.
ZSTD_FEED_BYTES = 1 << 10


class SourceError(ValueError):
    """A file, or the rest of it, cannot be read.

    Args:
        kind: As `Skips.add` takes it.
        cause: The sentence.
    """

    def __init__(self, kind: str, cause: str) -> None:
        super().__init__(cause)
        self.kind = kind


def read_blocks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The content of an open file, decompressed by its name (.gz, .zst: all members, all frames), in blocks.

    Raises:
        SourceError: It ends early, or its compression is damaged; what came before has been given.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return _zstd_blocks(raw)
    return _gzip_blocks(raw) if suffix == ".gz" else _blocks(raw)


def bounded_lines(blocks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their "\\n"; None in the place of one of more than `limit` bytes, which is not kept."""
    rest, too_long = bytearray(), False
    for block in blocks:
        if too_long and b"\n" not in block:
            continue
        *ended, last = block.split(b"\n")
        for end in ended:
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


def _blocks(raw: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: raw.read(BLOCK_BYTES), b"")


def _gzip_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    n_bytes = 0
    with gzip.GzipFile(fileobj=raw, mode="rb") as file:
        try:
            # read1 gives what lies before a damage; a whole block would be lost with it.
            while block := file.read1(BLOCK_BYTES):
                n_bytes += len(block)
                yield block
        except EOFError as error:
            raise SourceError(
                "truncated",
                f"truncated: the gzip stream ends early, after {n_bytes:,} bytes of content; copy the file again",
            ) from error
        except (OSError, zlib.error) as error:
            raise SourceError(
                "corrupt compression",
                f"the gzip stream is damaged after {n_bytes:,} bytes of content ({error}); copy the file again",
            ) from error
    if raw.tell() == 0:
        raise SourceError("truncated", "truncated: the gzip file is empty; copy the file again")


def _zstd_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    n_bytes, waiting, size = 0, [], 0
    decompressor = zstandard.ZstdDecompressor()
    frame, n_frames = None, 0
    try:
        while fed := raw.read(ZSTD_FEED_BYTES):
            while fed:
                if frame is None:
                    frame, n_frames = decompressor.decompressobj(), n_frames + 1
                content = frame.decompress(fed)
                fed = b""
                if frame.eof:
                    fed, frame = frame.unused_data, None
                waiting.append(content)
                size += len(content)
                n_bytes += len(content)
                if size >= BLOCK_BYTES:
                    yield b"".join(waiting)
                    waiting, size = [], 0
    except zstandard.ZstdError as error:
        if waiting:
            yield b"".join(waiting)
        raise SourceError(
            "corrupt compression",
            f"the zstd stream is damaged after {n_bytes:,} bytes of content ({error}); copy the file again",
        ) from error
    if waiting:
        yield b"".join(waiting)
    if frame is not None or n_frames == 0:
        raise SourceError(
            "truncated",
            f"truncated: the zstd stream ends early, after {n_bytes:,} bytes of content; copy the file again",
        )
