"""The artifact: one self-describing file with a network's quantized weights, config and tokenizer fingerprint.

No pickle, nothing in it is executed; a damaged or hostile file ends in an ArtifactError. container.py has the file's
frame, payload.py the layout of the weights.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from torch import Tensor

import hymba_lightning
from hymba_lightning.files import write_atomic
from hymba_lightning.quantization import container
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.container import ArtifactError
from hymba_lightning.quantization.int6 import QuantizedTensor
from hymba_lightning.quantization.payload import (
    Encoded,
    Entry,
    content_bytes,
    decode_tensor,
    encode_tensor,
    lay_out,
    parse_table,
    split_streams,
    to_planes,
)

log = logging.getLogger("hymba_lightning")

MAX_FITS = 8
DRAFT_LEVEL = 1  # entropy coding alone: within 0.05 % of level 22 on weights, and a hundred times as fast
HEADER_ALLOWANCE = 4096


class ArtifactTooLargeError(ValueError):
    """Artifact and evaluation code together exceed the limit."""


class Artifact(NamedTuple):
    """What an artifact holds."""

    config: dict  # of the network, for HymbaConfig.from_dict
    tokenizer: dict  # as given to save_artifact; its fingerprint tells whether a tokenizer fits
    metadata: dict
    state_dict: dict[str, Tensor]  # float32
    quantization: dict  # the QuantizationConfig it was written with


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
        lines += [f"{tensor.bytes:>11,}  {tensor.bytes / self.bytes:>6.1%}  {tensor.storage:<8}  {tensor.name} "
                  f"{tensor.shape}" for tensor in self.largest(count)]
        return "\n".join(lines)


def save_artifact(path: str | os.PathLike, state_dict: dict[str, Tensor], *, config: dict, tokenizer: dict,
                  metadata: dict, scheme: QuantizationConfig,
                  quantized: dict[str, QuantizedTensor] | None = None) -> ArtifactReport:
    """Quantizes, compresses and writes `state_dict`; atomic, and the same bytes for the same arguments.

    `config`, `tokenizer` and `metadata` are plain JSON values. `quantized` has tensors that another method (GPTQ)
    rounded already. Raises ValueError naming the tensor or field that cannot be stored, OSError where the file cannot
    be written (an earlier file at `path` is then untouched). An artifact that no coarsening fits into the limit is
    written all the same: refusing it is `check_limit`'s part.
    """
    if not state_dict:
        raise ValueError("there are no tensors to export")
    quantized = quantized or {}
    unknown = sorted(set(quantized) - set(state_dict))
    if unknown:
        raise ValueError(f"quantized tensors that the network does not have: {', '.join(unknown)}")
    if scheme.fit_limit:
        scheme = fit_to_limit(state_dict, scheme, quantized, scheme.limit_bytes - evaluation_code_bytes())
    content, counts, table = lay_out(encode_all(state_dict, scheme, quantized))
    header = {"config": config, "tokenizer": tokenizer, "metadata": metadata,
              "quantization": dataclasses.asdict(scheme), "streams": counts,
              "tensors": [entry.to_dict() for entry in table]}
    payload = container.compress(content, scheme.zstd_level)
    container.check_raw_size(len(content), len(payload))
    packed = container.pack(header, payload)
    write_atomic(Path(path), packed)
    return build_report(len(packed), Parts(header, counts, table, content, len(payload)))


def encode_all(state_dict: dict[str, Tensor], scheme: QuantizationConfig,
               quantized: dict[str, QuantizedTensor]) -> list[Encoded]:
    """Every tensor in the form that is stored."""
    return [encode_tensor(name, tensor, scheme, quantized.get(name)) for name, tensor in state_dict.items()]


def fit_to_limit(state_dict: dict[str, Tensor], scheme: QuantizationConfig, quantized: dict[str, QuantizedTensor],
                 budget: int) -> QuantizationConfig:
    """`scheme` with the least `coarsen` (to about 0.1 %) at which the artifact has at most `budget` bytes.

    Doubling the scales saves the entropy coder one bit a weight, so each attempt knows how far to go. Gives `scheme`
    back where it fits, where the limit cannot be met by coarser scales, or where the scheme is the reference's.
    """
    given = scheme
    for _ in range(MAX_FITS):
        content, counts, _ = lay_out(encode_all(state_dict, scheme, quantized))
        size = len(container.compress(content, DRAFT_LEVEL)) + HEADER_ALLOWANCE
        if size <= budget or scheme.scheme == "reference" or not counts["q"]:
            break
        # Level 22 may pack a trace worse than the draft.
        log_factor = 8 * (size - 0.998 * budget) / counts["q"] + math.log2(scheme.coarsen)
        if log_factor > scheme.bits - 2:
            return given
        scheme = dataclasses.replace(scheme, coarsen=2**log_factor)
    if scheme.coarsen != given.coarsen:
        log.warning("at %d bits the artifact exceeds its limit: all row scales are %.3f times as coarse (about %.2f "
                    "bits a weight less)", scheme.bits, scheme.coarsen, math.log2(scheme.coarsen / given.coarsen))
    return scheme


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


class Parts(NamedTuple):
    """A file taken apart, or about to be put together."""

    header: dict
    counts: dict[str, int]  # entries of each stream
    table: list[Entry]
    content: bytes  # the payload uncompressed
    payload_bytes: int  # and compressed


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


def build_report(file_bytes: int, parts: Parts) -> ArtifactReport:
    """Divides the payload among the tensors by what a fast compressor makes of each alone."""
    coder = zstandard.ZstdCompressor(level=1)
    streams = split_streams(parts.content, parts.counts)
    alone, raw = [], []
    for entry in parts.table:
        arrays = []
        if entry.storage != "alias":
            stream = "q" if entry.storage == "int" else entry.storage
            arrays.append(streams[stream][entry.offset:entry.offset + entry.numel])
        if entry.storage == "int":
            arrays.append(streams["scale"][entry.scale_offset:entry.scale_offset + entry.rows])
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


def evaluation_code_bytes() -> int:
    """Bytes of this package's Python files: the code that an evaluation of the artifact needs."""
    root = Path(hymba_lightning.__file__).parent
    return sum(file.stat().st_size for file in root.rglob("*.py"))


def check_limit(artifact_bytes: int, code_bytes: int, limit: int, report: ArtifactReport | None = None) -> None:
    """Raises ArtifactTooLargeError with the largest tensors and what to do where the sum exceeds `limit` bytes."""
    total = artifact_bytes + code_bytes
    if total <= limit:
        return
    largest = f"\n{report.table()}" if report else ""
    raise ArtifactTooLargeError(
        f"the artifact ({artifact_bytes:,} bytes) and the code for its evaluation ({code_bytes:,}) have {total:,} "
        f"bytes together, {total - limit:,} over the limit of {limit:,}. Lower bits, give the large tensors fewer bits "
        f"(name_bits, e.g. {{tok_emb: 8}}), train with more weight decay, or make the network smaller.{largest}")
