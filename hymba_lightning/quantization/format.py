"""The artifact's file: preamble, checksums, JSON header, payload. Bytes and tables only, no torch.

8  magic            4  format version     4  header bytes      8  payload bytes
32 SHA-256 of the payload                 32 SHA-256 of everything before it and of the header
header: JSON, UTF-8, one zstd frame       payload: one zstd frame

The payload's content is five streams, one after the other:
    q        one byte per quantized weight, recentred to 0 … 2*q_max; tensors of a kind side by side
    column   one byte per column of the tensors whose columns have factors: 2^((byte - 128) / 4)
    scale    float16 row scales        float16, float32   kept tensors
each float stream as byte planes: first every value's highest byte, then every second byte, … High bytes repeat and so
compress; low ones do not and would only break the runs. A tensor that equals an earlier one is stored as its alias.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from hymba_lightning.quantization.frames import ArtifactError, compress, decompress

MAGIC = b"\x89HYMBA\r\n"  # a byte over 127 and a line end: a copy in text mode breaks it visibly
# Version 1 had no stream of columns.
VERSION, READABLE = 2, (1, 2)
PREAMBLE = struct.Struct("<8sIIQ")
DIGEST_BYTES = 32
FIXED_BYTES = PREAMBLE.size + 2 * DIGEST_BYTES
MAX_HEADER_BYTES = 4 << 20
# Weights compress little, except zeros: as float32 they may be this much, whatever the file declares.
MAX_WEIGHTS_FLOOR, MAX_RATIO = 64 << 20, 64

STREAM_DTYPES: dict[str, np.dtype] = {
    "q": np.dtype("u1"),
    "column": np.dtype("u1"),
    "scale": np.dtype("<f2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
MAX_EXPONENT = 200
# Of a column's byte, in quarters of octaves: a power of two times the root that is next below, rounded to float32 once.
ROOTS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
COLUMN_FACTORS = np.array([math.ldexp(ROOTS[byte % 4], byte // 4 - 32) for byte in range(256)], np.float32)
MAX_DIMENSIONS = 8
MAX_NAME = 256
MAX_TENSORS = 65_536


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
    if version not in READABLE:
        raise ArtifactError(
            f"it has format version {version}, and this package reads {' and '.join(map(str, READABLE))}"
        )
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
    header = parse_header(packed_header)
    if version == 1 and isinstance(header.get("streams"), dict):
        if "column" in header["streams"]:
            raise ArtifactError("its header's list of streams is malformed: version 1 has none of columns")
        header["streams"] = header["streams"] | {"column": 0}
    return header, payload


def parse_header(packed_header: bytes) -> dict:
    """The JSON object in a compressed header."""
    try:
        raw_bytes = zstandard.get_frame_parameters(packed_header).content_size
    except zstandard.ZstdError as error:
        raise ArtifactError(f"its header cannot be decompressed ({error})") from error
    if raw_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"its header claims {raw_bytes} bytes of text, over the limit of {MAX_HEADER_BYTES}")
    try:
        text = decompress(packed_header, raw_bytes, "header").decode()
        header = json.loads(text, parse_constant=reject_constant, object_pairs_hook=without_repeats)
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


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that stands twice in an object: readers would differ in which one they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (repeated, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {repeated!r} stands twice in an object")
    return values


@dataclass
class Entry:
    """One line of the tensor table. `offset` and `scale_offset` count entries within the tensor's streams."""

    name: str
    shape: list[int]
    storage: str  # "int", "float16", "float32" or "alias"
    bits: int = 0
    exponent: int = 0
    offset: int = 0
    scale_offset: int = 0
    column_offset: int = -1  # where columns have no factors
    alias_of: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Scales of a quantized tensor."""
        return self.numel // self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self.shape[-1]

    def to_dict(self) -> dict:
        """The fields that this storage uses."""
        values: dict[str, Any] = {"name": self.name, "shape": self.shape, "storage": self.storage}
        if self.storage == "alias":
            return {**values, "alias_of": self.alias_of}
        values["offset"] = self.offset
        if self.storage == "int":
            values |= {"bits": self.bits, "exponent": self.exponent, "scale_offset": self.scale_offset}
            if self.column_offset >= 0:
                values["column_offset"] = self.column_offset
        return values


@dataclass
class Encoded:
    """One tensor in the form that is stored."""

    entry: Entry
    values: np.ndarray  # flat, in the dtype of its stream
    scale: np.ndarray | None  # float16, quantized tensors only
    columns: np.ndarray | None = None  # uint8, where columns have factors


def kind_of(name: str) -> tuple[str, list[int]]:
    """Sorts a tensor with its like of other layers: the name without numbers, then the numbers."""
    return re.sub(r"\d+", "#", name), [int(number) for number in re.findall(r"\d+", name)]


def lay_out(tensors: list[Encoded]) -> tuple[bytes, dict[str, int], list[Entry]]:
    """The content, the number of entries in each stream, and the tensor table. The order given does not matter."""
    parts: dict[str, list[np.ndarray]] = {stream: [] for stream in STREAM_DTYPES}
    counts = dict.fromkeys(STREAM_DTYPES, 0)
    first_with: dict[tuple, str] = {}
    table = []
    for encoded in sorted(tensors, key=lambda encoded: kind_of(encoded.entry.name)):
        entry = dataclasses.replace(encoded.entry)
        table.append(entry)
        scale = b"" if encoded.scale is None else encoded.scale.tobytes()
        columns = b"" if encoded.columns is None else encoded.columns.tobytes()
        key = (
            entry.storage,
            entry.bits,
            entry.exponent,
            *entry.shape,
            hashlib.sha256(encoded.values.tobytes() + scale + columns).digest(),
            len(columns),
        )
        if key in first_with:
            entry.storage, entry.alias_of = "alias", first_with[key]
            continue
        first_with[key] = entry.name
        stream = "q" if entry.storage == "int" else entry.storage
        entry.offset, entry.scale_offset = counts[stream], counts["scale"]
        parts[stream].append(encoded.values)
        counts[stream] += entry.numel
        if encoded.scale is not None:
            parts["scale"].append(encoded.scale)
            counts["scale"] += entry.rows
        if encoded.columns is not None:
            entry.column_offset = counts["column"]
            parts["column"].append(encoded.columns)
            counts["column"] += entry.columns
    content = b"".join(to_planes(np.concatenate(parts[stream])) for stream in STREAM_DTYPES if parts[stream])
    return content, counts, table


def boundaries(counts: dict[str, int], table: list[Entry]) -> list[int]:
    """Positions in the content where a quantized tensor or a byte plane ends, rising, the content's end excepted."""
    ends = [entry.offset + entry.numel for entry in table if entry.storage == "int"]
    end = counts["q"]
    for stream, dtype in list(STREAM_DTYPES.items())[1:]:
        ends += [end + counts[stream] * (plane + 1) for plane in range(dtype.itemsize)]
        end += counts[stream] * dtype.itemsize
    return [position for position in sorted(set(ends)) if 0 < position < end]


def to_planes(values: np.ndarray) -> bytes:
    """Little-endian values as byte planes, highest first."""
    width = values.dtype.itemsize
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, width).T[::-1]).tobytes()


def from_planes(content: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Inverse of `to_planes`."""
    return np.ascontiguousarray(content.reshape(dtype.itemsize, -1)[::-1].T).view(dtype).reshape(-1)


def parse_table(header: dict) -> tuple[dict[str, int], list[Entry]]:
    """The stream counts and the tensor table of a header, every value checked; nothing is allocated by size.

    The table must use each stream from its start to its end, in order. Raises ArtifactError.
    """
    counts = header.get("streams")
    if (
        not isinstance(counts, dict)
        or set(counts) != set(STREAM_DTYPES)
        or not all(is_count(count) for count in counts.values())
    ):
        raise ArtifactError("its header's list of streams is malformed")
    lines = header.get("tensors")
    if not isinstance(lines, list) or not 0 < len(lines) <= MAX_TENSORS:
        raise ArtifactError(f"its header has no table of 1 to {MAX_TENSORS} tensors")
    used = dict.fromkeys(STREAM_DTYPES, 0)
    table: dict[str, Entry] = {}
    for line in lines:
        entry = parse_entry(line)
        if entry.name in table:
            raise ArtifactError(f"its tensor table names {entry.name} twice")
        if entry.storage == "alias":
            original = table.get(entry.alias_of)
            if original is None or original.storage == "alias" or original.shape != entry.shape:
                raise ArtifactError(f"{entry.name} repeats {entry.alias_of}, which is no earlier tensor of its shape")
        else:
            take(used, counts, "q" if entry.storage == "int" else entry.storage, entry.offset, entry.numel, entry.name)
            if entry.storage == "int":
                take(used, counts, "scale", entry.scale_offset, entry.rows, entry.name)
                if entry.column_offset >= 0:
                    take(used, counts, "column", entry.column_offset, entry.columns, entry.name)
        table[entry.name] = entry
    if used != counts:
        raise ArtifactError(f"its streams have {counts} entries, and its tensors use {used}")
    return counts, list(table.values())


def is_count(value: object) -> bool:
    """An integer 0 … 2^40 (True is none)."""
    return type(value) is int and 0 <= value <= 1 << 40


def parse_entry(line: object) -> Entry:
    """One line of the table with its types and ranges checked."""
    if not isinstance(line, dict):
        raise ArtifactError("a line of its tensor table is no JSON object")
    try:
        entry = Entry(**line)
    except TypeError as error:
        raise ArtifactError(f"a line of its tensor table is malformed ({error})") from error
    if type(entry.name) is not str or not 0 < len(entry.name) <= MAX_NAME:
        raise ArtifactError(f"its tensor table has a name that is not a text of 1 to {MAX_NAME} characters")
    if (
        not isinstance(entry.shape, list)
        or not 0 < len(entry.shape) <= MAX_DIMENSIONS
        or not all(is_count(size) and size > 0 for size in entry.shape)
    ):
        raise ArtifactError(f"{entry.name} has no shape of 1 to {MAX_DIMENSIONS} positive sizes")
    if entry.storage not in ("int", "float16", "float32", "alias"):
        raise ArtifactError(f"{entry.name} is stored in an unknown way, {entry.storage!r}")
    places = [entry.offset, entry.scale_offset, *([entry.column_offset] if "column_offset" in line else [])]
    if not all(map(is_count, places)) or type(entry.alias_of) is not str:
        raise ArtifactError(f"{entry.name} has a malformed offset or alias")
    if "column_offset" in line and entry.storage != "int":
        raise ArtifactError(f"{entry.name} is stored as {entry.storage}, and only integers have factors of columns")
    if entry.storage == "int" and (type(entry.bits) is not int or not 2 <= entry.bits <= 8):
        raise ArtifactError(f"{entry.name} has {entry.bits!r} bits, and 2 to 8 can be read")
    if type(entry.exponent) is not int or abs(entry.exponent) > MAX_EXPONENT:
        raise ArtifactError(f"{entry.name} has an exponent of {entry.exponent!r}, outside ±{MAX_EXPONENT}")
    return entry


def take(used: dict[str, int], counts: dict[str, int], stream: str, offset: int, length: int, name: str) -> None:
    """Moves on in `stream` by `length` entries, which must start at `offset` and lie inside it."""
    if offset != used[stream] or offset + length > counts[stream]:
        raise ArtifactError(
            f"{name} lies at {offset} … {offset + length} of the {stream} stream of {counts[stream]} "
            f"entries, where {used[stream]} are used"
        )
    used[stream] += length


def content_bytes(counts: dict[str, int]) -> int:
    """Length of the content with these stream counts."""
    return sum(STREAM_DTYPES[stream].itemsize * count for stream, count in counts.items())


def split_streams(content: bytes, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """The streams as flat arrays, planes undone."""
    streams, start = {}, 0
    flat = np.frombuffer(content, np.uint8).copy()  # torch takes writable memory only
    for stream, dtype in STREAM_DTYPES.items():
        end = start + dtype.itemsize * counts[stream]
        streams[stream] = from_planes(flat[start:end], dtype)
        start = end
    return streams
