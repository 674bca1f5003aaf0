"""A file taken apart and verified: header, tensor table, content. No torch: a damaged file is refused at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hymba_lightning.quantization import container
from hymba_lightning.quantization.container import ArtifactError
from hymba_lightning.quantization.layout import Entry, content_bytes, parse_table


class Parts(NamedTuple):
    """A file taken apart, or about to be put together."""

    header: dict
    counts: dict[str, int]  # entries of each stream
    table: list[Entry]
    content: bytes  # the payload uncompressed
    payload_bytes: int  # and compressed


def read_parts(path: str | os.PathLike) -> Parts:
    """The parts of the file at `path`. Raises FileNotFoundError, or ArtifactError naming the file and its fault."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no artifact at {path}")
    try:
        with path.open("rb") as file:
            return read_verified(file, os.fstat(file.fileno()).st_size)
    except ArtifactError as error:
        raise naming(path, error) from error


def read_verified(file: BinaryIO, size: int) -> Parts:
    """The parts of a file of `size` bytes, sizes and checksums verified."""
    header, payload = container.read_sections(file, size)
    for section in ("config", "tokenizer", "metadata", "quantization"):
        if not isinstance(header.get(section), dict):
            raise ArtifactError(f"its header has no section '{section}'")
    counts, table = parse_table(header)
    raw_bytes = content_bytes(counts)
    container.check_raw_size(raw_bytes, len(payload))
    return Parts(header, counts, table, container.decompress(payload, raw_bytes, "payload"), len(payload))


def naming(path: str | os.PathLike, error: ArtifactError) -> ArtifactError:
    """The error with the file's path in front and the remedy behind."""
    return ArtifactError(f"{path} cannot be loaded: {error}. Copy or export it again")
