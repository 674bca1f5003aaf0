"""What an artifact holds and where its bytes are, as plain values and as a table. No torch, so it is quick."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from hymba_lightning.quantization.artifact import Artifact, Parts, decode_file, read_parts
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.format import split_streams, to_planes
from hymba_lightning.text import printable

COLUMNS = ("tensor", "shape", "width", "weights", "bytes", "bits/weight", "of limit")
SECTIONS = ("config", "tokenizer", "metadata", "quantization")


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
            if entry.column_offset >= 0:
                arrays.append(streams["column"][entry.column_offset : entry.column_offset + entry.columns])
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


def inspect_artifact(path: str | os.PathLike) -> tuple[Artifact, ArtifactReport]:
    """An artifact and where its bytes are. Raises as `load_artifact` does."""
    artifact, parts = decode_file(path)
    return artifact, build_report(Path(path).stat().st_size, parts)


def list_artifact(path: str | os.PathLike, code_bytes: Callable[[str], int]) -> dict[str, Any]:
    """Config, tokenizer, metadata, quantization, byte counts and a list of tensors, all of them JSON values.

    A tensor's `bytes` are its part of the compressed payload, `share` is of the limit that the file was made for;
    `code_bytes` gives those of the evaluation's code for a mixer, which count too; it is asked after the file was read.
    Raises FileNotFoundError, or ArtifactError naming the file and what is wrong with it.
    """
    parts = read_parts(path)
    report = build_report(Path(path).stat().st_size, parts)
    limit = parts.header["quantization"].get("limit_bytes")
    if type(limit) is not int or limit < 1:
        limit = QuantizationConfig().limit_bytes
    code = code_bytes(parts.header["config"].get("mixer", "mamba"))
    tensors = [
        {
            "name": tensor.name,
            "shape": tensor.shape,
            "storage": tensor.storage,
            "weights": entry.numel,
            "raw_bytes": tensor.raw_bytes,
            "bytes": tensor.bytes,
            "bits_per_weight": 8 * tensor.bytes / entry.numel,
            "share": tensor.bytes / limit,
        }
        for entry, tensor in zip(parts.table, report.tensors, strict=True)
    ]
    return {
        "path": str(path),
        "bytes": report.bytes,
        "header_bytes": report.header_bytes,
        "raw_bytes": report.raw_bytes,
        "code_bytes": code,
        "limit_bytes": limit,
        "share": (report.bytes + code) / limit,
        **{key: parts.header[key] for key in SECTIONS},
        "tensors": tensors,
    }


def as_table(listing: dict[str, Any]) -> str:
    """The listing as aligned lines of text; every line of the table is in the order of the file."""
    defaults = dataclasses.asdict(QuantizationConfig())
    quantization = {
        key: value for key, value in listing["quantization"].items() if key == "scheme" or value != defaults.get(key)
    }
    facts = [
        ("network", listing["config"]),
        ("tokenizer", listing["tokenizer"]),
        ("made by", listing["metadata"]),
        ("quantization", quantization),
    ]
    lines = [
        f"{printable(listing['path'])}: {listing['bytes']:,} bytes + {listing['code_bytes']:,} of evaluation "
        f"code, {listing['share']:.2%} of {listing['limit_bytes']:,}"
    ]
    lines += [
        f"{title:<13} {printable(', '.join(f'{key} {value}' for key, value in values.items()))}"
        for title, values in facts
    ]
    return "\n".join([*lines, "", *align(rows_of(listing))])


def rows_of(listing: dict[str, Any]) -> list[tuple[str, ...]]:
    """Head, one row per tensor, the file's own overhead, and the sum."""
    limit, tensors = listing["limit_bytes"], listing["tensors"]
    weights = sum(tensor["weights"] for tensor in tensors if not tensor["storage"].startswith("alias"))
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [
        (
            printable(tensor["name"]),
            "×".join(map(str, tensor["shape"])),
            printable(tensor["storage"]),
            f"{tensor['weights']:,}",
            f"{tensor['bytes']:,}",
            f"{tensor['bits_per_weight']:.2f}",
            f"{tensor['share']:.2%}",
        )
        for tensor in tensors
    ]
    head = listing["header_bytes"]
    rows.append(("header, checksums", "", "", "", f"{head:,}", "", f"{head / limit:.2%}"))
    rows.append(
        (
            "file",
            "",
            "",
            f"{weights:,}",
            f"{listing['bytes']:,}",
            f"{8 * listing['bytes'] / weights:.2f}",
            f"{listing['bytes'] / limit:.2%}",
        )
    )
    return rows


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows with columns of equal width: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
