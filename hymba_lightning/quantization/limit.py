"""The limit in bytes: what counts, what happens past it, and how coarse the scales must be to keep it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from torch import Tensor

import hymba_lightning
from hymba_lightning.quantization import container
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.int6 import QuantizedTensor, coarsen_rows
from hymba_lightning.quantization.payload import Encoded, encode_tensor, lay_out
from hymba_lightning.quantization.report import ArtifactReport

log = logging.getLogger("hymba_lightning")

MAX_ATTEMPTS = 8
DRAFT_LEVEL = 1  # entropy coding alone: within 0.05 % of level 22 on weights, and a hundred times as fast
HEADER_ALLOWANCE = 4096
AIM = 0.998  # of the budget, since level 22 may pack a trace worse than the draft


class ArtifactTooLargeError(ValueError):
    """Artifact and evaluation code together exceed the limit."""


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


def fit_to_limit(state_dict: dict[str, Tensor], encoded: list[Encoded], quantized: dict[str, QuantizedTensor],
                 scheme: QuantizationConfig, budget: int) -> tuple[QuantizationConfig, list[Encoded]]:
    """`scheme` and the encoded tensors with the least `coarsen` at which the artifact has at most `budget` bytes.

    `quantized` are the tensors that may become coarser; `encoded` has all tensors at the fineness of `scheme`, and is
    given back with it where that fits or where no coarsening would. Doubling the scales saves the entropy coder one
    bit a weight, so each attempt knows how far to go.
    """
    n_weights = sum(tensor.q.numel() for tensor in quantized.values())
    log_factor, attempt = 0.0, encoded
    for _ in range(MAX_ATTEMPTS):
        content, _, _ = lay_out(attempt)
        size = len(container.compress(content, DRAFT_LEVEL)) + HEADER_ALLOWANCE
        if size <= budget or not n_weights:
            break
        log_factor += 8 * (size - AIM * budget) / n_weights
        if log_factor > scheme.bits - 2:  # three levels are left
            log.warning("no coarser scales bring the artifact under its limit: exported at full fineness")
            return scheme, encoded
        attempt = [coarser(item, state_dict[item.entry.name], quantized.get(item.entry.name), 2**log_factor)
                   for item in encoded]
    if not log_factor:
        return scheme, encoded
    log.warning("at %d bits the artifact exceeds its limit: all row scales are %.3f times as coarse (about %.2f bits a "
                "weight less)", scheme.bits, 2**log_factor, log_factor)
    return dataclasses.replace(scheme, coarsen=scheme.coarsen * 2**log_factor), attempt


def coarser(encoded: Encoded, weight: Tensor, quantized: QuantizedTensor | None, factor: float) -> Encoded:
    """A tensor with its scales `factor` times as coarse; as it is where it has none of ours."""
    if quantized is None:
        return encoded
    return encode_tensor(encoded.entry.name, weight, "int", coarsen_rows(weight, quantized, factor))
