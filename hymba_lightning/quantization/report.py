"""Where an artifact's bytes are, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import zstandard

from hymba_lightning.quantization.layout import split_streams, to_planes
from hymba_lightning.quantization.parts import Parts


class TensorReport(NamedTuple):
    """One tensor's part of an artifact."""

    name: str
    shape: list[int]
    storage: str  # 'int6', 'float16', 'float32', 'alias of …'
    raw_bytes: int  # before compression
    bytes: int  # estimated share of the compressed payload


@dataclass
class ArtifactReport:
    """Where an artifact's bytes are."""

    bytes: int
    """Size of the file."""
    header_bytes: int
    """Preamble, checksums and compressed header."""
    raw_bytes: int
    """The payload before compression."""
    tensors: list[TensorReport]
    """Every tensor, in the order of the file."""
    coarsen: float = 1.0
    """Factor on the row scales that the limit needed; 1 where everything fitted."""

    def largest(self, count: int) -> list[TensorReport]:
        """The `count` tensors with the most compressed bytes."""
        return sorted(self.tensors, key=lambda tensor: -tensor.bytes)[:count]

    def table(self, count: int = 10) -> str:
        """The largest tensors as lines of text, for messages."""
        lines = [f"{'bytes':>11}  {'share':>6}  {'as':<8}  tensor"]
        lines += [
            f"{tensor.bytes:>11,}  {tensor.bytes / self.bytes:>6.1%}  {tensor.storage:<8}  {tensor.name} {tensor.shape}"
            for tensor in self.largest(count)
        ]
        return "\n".join(lines)


def build_report(file_bytes: int, parts: Parts) -> ArtifactReport:
    """Divides the payload among the tensors by what a fast compressor makes of each alone."""
    coder = zstandard.ZstdCompressor(level=1)
    streams = split_streams(parts.content, parts.counts)
    alone, raw = [], []
    for entry in parts.table:
        arrays = []
        if entry.storage != "alias":
            stream = "q" if entry.storage == "int" else entry.storage
            arrays.append(streams[stream][entry.offset : entry.offset + entry.numel])
        if entry.storage == "int":
            arrays.append(streams["scale"][entry.scale_offset : entry.scale_offset + entry.rows])
        raw.append(sum(array.nbytes for array in arrays))
        alone.append(sum(len(coder.compress(to_planes(array))) for array in arrays))
    total = sum(alone)
    reports = []
    for entry, own, own_raw in zip(parts.table, alone, raw, strict=True):
        storage = {"int": f"int{entry.bits}", "alias": f"alias of {entry.alias_of}"}.get(entry.storage, entry.storage)
        share = round(parts.payload_bytes * own / total)
        reports.append(TensorReport(entry.name, entry.shape, storage, own_raw, share))
    coarsen = parts.header["quantization"].get("coarsen", 1.0)
    return ArtifactReport(file_bytes, file_bytes - parts.payload_bytes, len(parts.content), reports, coarsen)
