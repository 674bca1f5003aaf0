"""The limit in bytes: what counts, what happens past it, and how coarse the scales must be to keep it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Protocol

from hymba_lightning.closure import ROOT, needed_files
from hymba_lightning.model.mixers import MIXERS
from hymba_lightning.quantization.layout import Encoded
from hymba_lightning.quantization.report import ArtifactReport

log = logging.getLogger("hymba_lightning")

# Scores an artifact with nothing but itself, the tokenizer and the validation shards (`hymba package` copies it).
REFEREE = "hymba_lightning.package.referee"
MAX_ATTEMPTS = 6
AIM, CLOSE = 0.998, 0.995  # of the budget: where to go, and what is near enough


class Measure(Protocol):
    """Bytes of the file that these tensors would make; `exact` takes the time to compress it in earnest."""

    def __call__(self, encoded: list[Encoded], exact: bool = False) -> int: ...


class ArtifactTooLargeError(ValueError):
    """Artifact and evaluation code together exceed the limit."""


def evaluation_code_bytes(mixer: str = "mamba") -> int:
    """Bytes of the code that an evaluation of an artifact needs: the referee's module, its network's mixer, and all
    that they import."""
    return sum((ROOT.parent / file).stat().st_size for file in needed_files(REFEREE, MIXERS[mixer]))


def check_limit(artifact_bytes: int, code_bytes: int, limit: int, report: ArtifactReport | None = None) -> None:
    """Raises ArtifactTooLargeError with the largest tensors and what to do where the sum exceeds `limit` bytes."""
    total = artifact_bytes + code_bytes
    if total <= limit:
        return
    largest = f"\n{report.table()}" if report else ""
    raise ArtifactTooLargeError(
        f"the artifact ({artifact_bytes:,} bytes) and the code for its evaluation ({code_bytes:,}) have {total:,} "
        f"bytes together, {total - limit:,} over the limit of {limit:,}. Lower bits, give the large tensors fewer bits "
        f"(name_bits, e.g. {{tok_emb: 8}}), train with more weight decay, or make the network smaller.{largest}"
    )


def fit_to_limit(
    encode: Callable[[float], list[Encoded]], measure: Measure, budget: int, max_factor: float, start: float = 1.0
) -> tuple[float, list[Encoded]]:
    """The least factor on the row scales, from `start` up, at which the artifact has at most `budget` bytes.

    `encode(factor)` gives all tensors at that factor, `measure` the bytes of a file of them. Doubling the scales saves
    the entropy coder about a bit a weight, so the first attempt knows nearly how far to go, and later ones go by the
    saving they saw. Returns the factor and its tensors; where no factor up to `max_factor` would do, those of `start`.
    """
    first, log_start = encode(start), math.log2(start)
    log_factor, encoded, best = log_start, first, None
    n_weights = sum(tensor.entry.numel for tensor in first if tensor.entry.storage == "int")
    sizes: dict[float, int] = {}
    for _ in range(MAX_ATTEMPTS):
        sizes[log_factor] = measure(encoded)
        if sizes[log_factor] <= budget:
            best = (2**log_factor, encoded)
            if log_factor == log_start or sizes[log_factor] >= CLOSE * budget:
                break
        saved_per_doubling = n_weights / 8
        if len(sizes) > 1:
            (low, large), *_, (high, small) = sorted(sizes.items())
            saved_per_doubling = (large - small) / (high - low)
        if saved_per_doubling <= 0:
            break
        log_factor = max(log_start, log_factor + (sizes[log_factor] - AIM * budget) / saved_per_doubling)
        if 2**log_factor > max_factor or log_factor in sizes:
            break
        encoded = encode(2**log_factor)
    if best is None:
        log.warning("no coarser scales bring the artifact under its limit: exported without")
        return start, first
    return best
