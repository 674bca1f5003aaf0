"""The artifact's file: preamble, checksums, JSON header, payload. Bytes only; what they mean is layout.py's.

8  magic            4  format version     4  header bytes      8  payload bytes
32 SHA-256 of the payload                 32 SHA-256 of everything before it and of the header
header: JSON, UTF-8, one zstd frame       payload: one zstd frame
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

MAGIC = b"\x89HYMBA\r\n"  # a byte over 127 and a line end: a copy in text mode breaks it visibly
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQ")
DIGEST_BYTES = 32
FIXED_BYTES = PREAMBLE.size + 2 * DIGEST_BYTES
MAX_HEADER_BYTES = 4 << 20
# Weights compress little, except zeros: as float32 they may be this much, whatever the file declares.
MAX_WEIGHTS_FLOOR, MAX_RATIO = 64 << 20, 64
MAX_WINDOW_BYTES = 128 << 20
# Weights repeat nothing, so short matches only blunt the entropy coder; level 22 takes 5 s instead of 30 for 26M.
MIN_MATCH = 7
# Levels that do little but code the entropy: on weights 0.1 % better to 4 % worse than level 22, 100 times as fast.
DRAFT_LEVELS = (1, 3)


class ArtifactError(ValueError):
    """The file is not an artifact that this version can read, or is damaged."""


def compress(raw: bytes, level: int, cuts: Sequence[int] = ()) -> bytes:
    """One zstd frame that declares its content's size, never larger than `draft`'s; the same for the same input.

    At the `cuts`, positions in `raw`, where another kind of numbers begins, the coder makes new tables.
    """
    return min(draft(raw, cuts), frame(raw, level, cuts), key=len)


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


def check_weights_size(numel: int, payload_bytes: int) -> None:
    """Raises ArtifactError where so many weights are absurdly more than the compressed form can hold."""
    most = (MAX_WEIGHTS_FLOOR + MAX_RATIO * payload_bytes) // 4
    if numel > most:
        raise ArtifactError(
            f"its payload of {payload_bytes} bytes claims {numel} weights, over the {most} that are allowed"
        )


def pack(header: dict, payload: bytes) -> bytes:
    """The whole file's bytes. Raises ValueError where the header has values that JSON cannot hold."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an artifact's config, tokenizer and metadata hold plain values only: {error}") from error
    raw_header = text.encode()
    if len(raw_header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the artifact's header has {len(raw_header)} bytes, over the limit of {MAX_HEADER_BYTES}: "
            f"shorten its metadata"
        )
    return seal(compress(raw_header, 22), payload)


def seal(packed_header: bytes, payload: bytes, version: int = VERSION) -> bytes:
    """Preamble and checksums in front of a compressed header and payload."""
    front = PREAMBLE.pack(MAGIC, version, len(packed_header), len(payload)) + hashlib.sha256(payload).digest()
    return front + hashlib.sha256(front + packed_header).digest() + packed_header + payload


def is_artifact(path: str | os.PathLike) -> bool:
    """Whether the file at `path` starts like an artifact; False where there is no such file."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_sections(file: BinaryIO, size: int) -> tuple[dict, bytes]:
    """The header and the compressed payload of an artifact of `size` bytes, checksums verified.

    Raises ArtifactError saying what is wrong, before reading more than the fixed part where sizes do not agree.
    """
    preamble = file.read(PREAMBLE.size)
    if not preamble.startswith(MAGIC):
        raise ArtifactError("it is not an artifact of this package: its first bytes differ")
    if size < FIXED_BYTES:
        raise ArtifactError(f"it is truncated: {size} bytes, and the fixed part alone has {FIXED_BYTES}")
    _, version, header_bytes, payload_bytes = PREAMBLE.unpack(preamble)
    if version != VERSION:
        raise ArtifactError(f"it has format version {version}, and this package reads version {VERSION}")
    expected = FIXED_BYTES + header_bytes + payload_bytes
    if size != expected:
        state = "truncated" if size < expected else "longer than it says"
        raise ArtifactError(f"it is {state}: {size} bytes where {expected} are declared")
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"its header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
    payload_digest, header_digest = file.read(DIGEST_BYTES), file.read(DIGEST_BYTES)
    packed_header = file.read(header_bytes)
    if hashlib.sha256(preamble + payload_digest + packed_header).digest() != header_digest:
        raise ArtifactError("its header is damaged: the checksum differs")
    payload = file.read(payload_bytes)
    if hashlib.sha256(payload).digest() != payload_digest:
        raise ArtifactError("its payload is damaged: the checksum differs")
    return parse_header(packed_header), payload


def parse_header(packed_header: bytes) -> dict:
    """The JSON object in a compressed header."""
    try:
        raw_bytes = zstandard.get_frame_parameters(packed_header).content_size
    except zstandard.ZstdError as error:
        raise ArtifactError(f"its header cannot be decompressed ({error})") from error
    if raw_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"its header claims {raw_bytes} bytes of text, over the limit of {MAX_HEADER_BYTES}")
    try:
        header = json.loads(decompress(packed_header, raw_bytes, "header").decode(), parse_constant=reject_constant)
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError("its header is not a JSON object")
    return header


def reject_constant(word: str) -> None:
    """Refuses NaN and Infinity, which JSON does not know but Python's reader accepts."""
    raise ValueError(f"{word} is not a JSON value")
