"""Bytes of an artifact as one zstd frame, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import zstandard

MAX_WINDOW_BYTES = 128 << 20
# Weights repeat nothing, so short matches only blunt the entropy coder; level 22 takes 5 s instead of 30 for 26M.
MIN_MATCH = 7
# Levels that do little but code the entropy: on weights 0.1 % better to 4 % worse than level 22, 100 times as fast.
DRAFT_LEVELS = (1, 3)
# From so many bytes on the higher levels, which take a second for 4 MB, are tried only where pieces of the content
# say that they gain so much: on six trained networks of 27M weights level 22 lost 0.5 to 2.7 % of the whole content
# where it gained up to 1.4 % of such pieces.
LONG, PIECES, PIECE_BYTES, WORTH = 8 << 20, 8, 256 << 10, 0.97


class ArtifactError(ValueError):
    """The file is not an artifact that this version can read, or is damaged."""


def compress(raw: bytes, level: int, cuts: Sequence[int] = ()) -> bytes:
    """One zstd frame that declares its content's size, never larger than `draft`'s; the same for the same input.

    At the `cuts`, positions in `raw`, where another kind of numbers begins, the coder makes new tables.
    """
    quick = draft(raw, cuts)
    return min(quick, frame(raw, level, cuts), key=len) if may_gain(raw, level) else quick


def may_gain(raw: bytes, level: int) -> bool:
    """Whether `level` is worth its time on `raw` beside a draft; of long content, by pieces of it."""
    if len(raw) < LONG:
        return True
    starts = [i * (len(raw) - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES)]
    sample = b"".join(raw[start : start + PIECE_BYTES] for start in starts)
    cuts = [i * PIECE_BYTES for i in range(1, PIECES)]
    return len(frame(sample, level, cuts)) < WORTH * len(draft(sample, cuts))


def draft(raw: bytes, cuts: Sequence[int] = ()) -> bytes:
    """Nearly what `compress` gives, at once."""
    return min((frame(raw, level, cuts) for level in DRAFT_LEVELS), key=len)


def frame(raw: bytes, level: int, cuts: Sequence[int] = ()) -> bytes:
    """One zstd frame, with blocks that end at the `cuts`."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(raw), min_match=MIN_MATCH)
    coder = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(raw))
    parts = []
    for start, end in itertools.pairwise([0, *cuts, len(raw)]):
        parts.append(coder.compress(raw[start:end]))
        if end < len(raw):
            parts.append(coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*parts, coder.flush()])


def decompress(frame: bytes, raw_bytes: int, what: str) -> bytes:
    """The content of one zstd frame that must be exactly `raw_bytes` long; checked before anything is allocated."""
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared != raw_bytes:
            raise ArtifactError(f"its {what} declares {declared} bytes of content where {raw_bytes} are expected")
        if raw_bytes == 0:
            raise ArtifactError(f"its {what} is empty")
        raw = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"its {what} cannot be decompressed ({error})") from error
    if len(raw) != raw_bytes:
        raise ArtifactError(f"its {what} has {len(raw)} bytes of content where {raw_bytes} are expected")
    return raw
