"""The artifact: one self-describing file with a network's quantized weights, config and tokenizer fingerprint.

No pickle, nothing in it is executed; a damaged or hostile file ends in an ArtifactError. container.py has the file's
frame, payload.py the layout of the weights.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.quantization import container
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.container import ArtifactError
from hymba_lightning.quantization.encode import encode_state_dict
from hymba_lightning.quantization.int6 import QuantizedTensor
from hymba_lightning.quantization.limit import ArtifactTooLargeError, check_limit, evaluation_code_bytes
from hymba_lightning.quantization.payload import content_bytes, decode_tensor, lay_out, parse_table, split_streams
from hymba_lightning.quantization.report import ArtifactReport, Parts, build_report

__all__ = [
    "Artifact", "ArtifactError", "ArtifactReport", "ArtifactTooLargeError", "check_limit", "evaluation_code_bytes",
    "inspect_artifact", "load_artifact", "save_artifact",
]


class Artifact(NamedTuple):
    """What an artifact holds."""

    config: dict  # of the network, for HymbaConfig.from_dict
    tokenizer: dict  # as given to save_artifact; its fingerprint tells whether a tokenizer fits
    metadata: dict
    state_dict: dict[str, Tensor]  # float32
    quantization: dict  # the QuantizationConfig it was written with


def save_artifact(path: str | os.PathLike, state_dict: dict[str, Tensor], *, config: dict, tokenizer: dict,
                  metadata: dict, scheme: QuantizationConfig,
                  quantized: dict[str, QuantizedTensor] | None = None,
                  hessians: dict[str, Tensor] | None = None) -> ArtifactReport:
    """Quantizes, compresses and writes `state_dict`; atomic, and the same bytes for the same arguments.

    `config`, `tokenizer` and `metadata` are plain JSON values. `hessians` (of `collect_hessians`) are what the scheme
    'gptq' needs; `quantized` has tensors that are rounded already. Raises ValueError naming the tensor or field that
    cannot be stored, OSError where the file cannot be written (an earlier file at `path` is then untouched). An
    artifact that no coarsening fits into the limit is written all the same: refusing it is `check_limit`'s part.
    """
    if not state_dict:
        raise ValueError("there are no tensors to export")
    encoded, scheme = encode_state_dict(state_dict, scheme, quantized or {}, hessians)
    content, counts, table = lay_out(encoded)
    header = {"config": config, "tokenizer": tokenizer, "metadata": metadata,
              "quantization": dataclasses.asdict(scheme), "streams": counts,
              "tensors": [entry.to_dict() for entry in table]}
    payload = container.compress(content, scheme.zstd_level)
    container.check_raw_size(len(content), len(payload))
    packed = container.pack(header, payload)
    write_atomic(Path(path), packed)
    return build_report(len(packed), Parts(header, counts, table, content, len(payload)))


def load_artifact(path: str | os.PathLike) -> Artifact:
    """Reads an artifact. Raises FileNotFoundError, or ArtifactError naming the file and what is wrong with it."""
    return decode_file(path)[0]


def inspect_artifact(path: str | os.PathLike) -> tuple[Artifact, ArtifactReport]:
    """An artifact and where its bytes are. Raises as `load_artifact` does."""
    artifact, parts = decode_file(path)
    return artifact, build_report(Path(path).stat().st_size, parts)


def decode_file(path: str | os.PathLike) -> tuple[Artifact, Parts]:
    """The artifact in a file and its parts; puts the file's path in front of an ArtifactError's message."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no artifact at {path}")
    try:
        with path.open("rb") as file:
            parts = read_verified(file, os.fstat(file.fileno()).st_size)
        return decode(parts), parts
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}. Copy or export it again") from error


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


def decode(parts: Parts) -> Artifact:
    """The tensors and dictionaries in a file's parts."""
    streams = split_streams(parts.content, parts.counts)
    state_dict: dict[str, Tensor] = {}
    for entry in parts.table:
        state_dict[entry.name] = state_dict[entry.alias_of].clone() if entry.storage == "alias" else \
            decode_tensor(entry, streams)
    header = parts.header
    return Artifact(header["config"], header["tokenizer"], header["metadata"], state_dict, header["quantization"])
