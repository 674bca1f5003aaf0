"""What an artifact holds and where its bytes are, as plain values and as a table. No torch, so it is quick."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.limit import evaluation_code_bytes
from hymba_lightning.quantization.parts import read_parts
from hymba_lightning.quantization.report import build_report
from hymba_lightning.text import printable

COLUMNS = ("tensor", "shape", "width", "weights", "bytes", "bits/weight", "of limit")
SECTIONS = ("config", "tokenizer", "metadata", "quantization")


def list_artifact(path: str | os.PathLike) -> dict[str, Any]:
    """Config, tokenizer, metadata, quantization, byte counts and a list of tensors, all of them JSON values.

    A tensor's `bytes` are its part of the compressed payload, `share` is of the limit that the file was made for.
    Raises FileNotFoundError, or ArtifactError naming the file and what is wrong with it.
    """
    parts = read_parts(path)
    report = build_report(Path(path).stat().st_size, parts)
    limit = parts.header["quantization"].get("limit_bytes")
    if type(limit) is not int or limit < 1:
        limit = QuantizationConfig().limit_bytes
    code_bytes = evaluation_code_bytes(parts.header["config"].get("mixer", "mamba"))
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
        "code_bytes": code_bytes,
        "limit_bytes": limit,
        "share": (report.bytes + code_bytes) / limit,
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
