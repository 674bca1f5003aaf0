"""Time and memory of generation against the length of the context: both should not depend on it."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.evaluation.carried import read
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState


class LengthResult(NamedTuple):
    """One length of context."""

    context: int
    read_seconds: float  # since the length before
    ms_per_token: float  # median
    state_bytes: int
    peak_rss_mib: float  # of the process so far


def state_bytes(state: HymbaState) -> int:
    """Memory that a state keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors()}.values())


def measure(
    net: Hymba, lengths: list[int], n_new: int, prefill_tokens: int = 2048, tokens: Tensor | None = None
) -> Iterator[LengthResult]:
    """Reads a context (random tokens by default) and, at each of the rising lengths, draws `n_new` tokens greedily.

    The tokens drawn are not kept: each length goes on from the one before. Raises ValueError for lengths that do not
    rise.
    """
    if lengths != sorted(set(lengths)):
        raise ValueError(f"the lengths must rise, got {lengths}")
    device = net.tok_emb.weight.device
    if tokens is None:
        tokens = torch.randint(0, net.config.vocab_size, (lengths[-1],), generator=torch.Generator().manual_seed(0))
    net.eval()
    state, done = None, 0
    for length in lengths:
        started = time.monotonic()
        logits_BV, state = read(net, tokens[None, done:length].to(device), state, prefill_tokens)
        reading, done = time.monotonic() - started, length
        kept, times = state, []
        for _ in range(n_new):
            started = time.monotonic()
            logits_BV, state = read(net, logits_BV.argmax(-1, keepdim=True), state, 1)
            float(logits_BV[0, 0])
            times.append(1000 * (time.monotonic() - started))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield LengthResult(length, reading, statistics.median(times), state_bytes(state), peak)
        state = kept


def table(results: list[LengthResult]) -> str:
    """Markdown."""
    rows = [
        "| tokens of context | ms per new token | state | peak memory of the process | read at |",
        "|---|---|---|---|---|",
    ]
    before = 0
    for result in results:
        rate = (result.context - before) / result.read_seconds
        before = result.context
        rows.append(
            f"| {result.context:,} | {result.ms_per_token:.2f} | {result.state_bytes / 1024:,.0f} KiB | "
            f"{result.peak_rss_mib:,.0f} MiB | {rate:,.0f} tokens/s |"
        )
    return "\n".join(rows) + "\n"
