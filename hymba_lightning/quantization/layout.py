"""How an artifact's tensors lie in its content, and where: bytes and tables only, no torch. Numbers are checked.

The content is four streams, one after the other:
    q        one byte per quantized weight, recentred to 0 … 2*q_max; tensors of a kind side by side
    scale    float16 row scales        float16, float32   kept tensors
each float stream as byte planes: first every value's highest byte, then every second byte, … High bytes repeat and so
compress; low ones do not and would only break the runs. A tensor that equals an earlier one is stored as its alias.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from hymba_lightning.quantization.container import ArtifactError

STREAM_DTYPES: dict[str, np.dtype] = {
    "q": np.dtype("u1"),
    "scale": np.dtype("<f2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
MAX_EXPONENT = 200
MAX_DIMENSIONS = 8
MAX_NAME = 256
MAX_TENSORS = 65_536


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
    alias_of: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Scales of a quantized tensor."""
        return self.numel // self.shape[-1] if len(self.shape) > 1 else 1

    def to_dict(self) -> dict:
        """The fields that this storage uses."""
        values: dict[str, Any] = {"name": self.name, "shape": self.shape, "storage": self.storage}
        if self.storage == "alias":
            return {**values, "alias_of": self.alias_of}
        values["offset"] = self.offset
        if self.storage == "int":
            values |= {"bits": self.bits, "exponent": self.exponent, "scale_offset": self.scale_offset}
        return values


@dataclass
class Encoded:
    """One tensor in the form that is stored."""

    entry: Entry
    values: np.ndarray  # flat, in the dtype of its stream
    scale: np.ndarray | None  # float16, quantized tensors only


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
        key = (
            entry.storage,
            entry.bits,
            entry.exponent,
            *entry.shape,
            hashlib.sha256(encoded.values.tobytes() + scale).digest(),
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
    if not is_count(entry.offset) or not is_count(entry.scale_offset) or type(entry.alias_of) is not str:
        raise ArtifactError(f"{entry.name} has a malformed offset or alias")
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
