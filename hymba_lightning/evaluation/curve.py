"""What context is worth: bits per byte against the tokens a target was predicted from, in bins that double."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Bin b holds the contexts 2^b … 2^(b+1) - 1.
N_BINS = 40
# A bin of fewer tokens says nothing that a picture should show.
MIN_TOKENS = 200


class CurvePoint(NamedTuple):
    """One bin: contexts `at_least` … 2·at_least - 1."""

    at_least: int
    bpb: float
    n_tokens: int


class ContextCurve:
    """Float64 sums of nats, tokens and bytes by context: constant memory, whatever the length of the stream."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, N_BINS, dtype=torch.float64)

    def add(self, context: Tensor, nats: Tensor, target_bytes: Tensor) -> None:
        """context (n,) >= 1: tokens each target was predicted from; its nats (n,) and bytes (n,)."""
        # Exact in float64 for every length of text there is: log2 rounds up to a power of two only beyond 2^48.
        bins = torch.log2(context.double()).floor().long()
        values = torch.stack([nats.double().cpu(), torch.ones(nats.numel()).double(), target_bytes.double().cpu()])
        self._sums.index_add_(1, bins, values)

    def points(self) -> list[CurvePoint]:
        """The bins that have text in them."""
        nats, n_tokens, n_bytes = self._sums
        return [CurvePoint(1 << b, float(nats[b] / (math.log(2) * n_bytes[b])), int(n_tokens[b]))
                for b in range(N_BINS) if n_bytes[b] > 0]


class DocumentPosition:
    """Tokens since the start of the document, for consecutive parts of a stream."""

    def __init__(self, bos_id: int) -> None:
        self._bos_id = bos_id
        self._position = 0

    def of_targets(self, tokens: Tensor) -> Tensor:
        """tokens (n+1,), the first being the last of the part before → (n,) int64: for each of tokens[1:], how many
        tokens of its document are before it, the BOS included. A BOS itself belongs to the document it ends."""
        tokens = tokens.cpu()
        place = torch.arange(tokens.numel())
        start = torch.where(tokens == self._bos_id, place, -1).cummax(0).values
        since = torch.where(start >= 0, place - start, place + self._position) + 1
        # tokens[n] comes again as the first of the next part.
        self._position = int(since[-1]) - 1
        return since[:-1]
