"""What context is worth: bits per byte of the tokens that were predicted from 1, 2–3, 4–7, 8–15, … tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.units import bits_per_byte

# Bin b holds the contexts 2^b … 2^(b+1) - 1.
N_BINS = 40
# A bin of fewer tokens, or of fewer texts, says nothing that a picture should show. A stream that is carried as one
# sequence has every context once: its bins tell passages apart, not long contexts from short ones.
MIN_TOKENS, MIN_TEXTS = 200, 4


class CurvePoint(NamedTuple):
    """The score of the tokens that were predicted from `at_least` to 2·at_least - 1 tokens."""

    at_least: int
    bpb: float
    n_tokens: int
    error: float = 0.0
    """Standard error of `bpb` from the spread of the bin's tokens, taken as independent: neighbours in a text are not,
    so that it is a lower bound."""


def is_shown(at_least: int, n_tokens: int) -> bool:
    """Whether a text of n_tokens is long enough for the bin of contexts from `at_least` tokens on to say something."""
    return n_tokens >= max(MIN_TOKENS, MIN_TEXTS * at_least)


class ContextCurve:
    """Gathers the curve over a stream of any length, in constant memory: float64 sums for each bin of contexts."""

    def __init__(self) -> None:
        self._sums = torch.zeros(6, N_BINS, dtype=torch.float64)

    def add(self, context: Tensor, nats: Tensor, target_bytes: Tensor) -> None:
        """Takes in n scored tokens.

        Args:
            context: (n,) int64, at least 1: from how many tokens each was predicted.
            nats: (n,), its loss.
            target_bytes: (n,), the UTF-8 bytes that it stands for.
        """
        # Exact in float64 for every length of text there is: log2 rounds up to a power of two only beyond 2^48.
        bins = torch.log2(context.double()).floor().long()
        nats, n_bytes = nats.double().cpu(), target_bytes.double().cpu()
        values = torch.stack([nats, torch.ones_like(nats), n_bytes, nats**2, nats * n_bytes, n_bytes**2])
        self._sums.index_add_(1, bins, values)

    def points(self) -> list[CurvePoint]:
        """The curve: a point for each bin with at least one byte of text, shortest contexts first."""
        nats, n_tokens, n_bytes, squares, products, byte_squares = self._sums
        rate = nats / n_bytes
        # Of a ratio of sums: the spread of nats - rate · bytes (Cochran, Sampling Techniques, 1977, section 6.3).
        spread = (squares - 2 * rate * products + rate**2 * byte_squares).clamp_min(0)
        return [
            CurvePoint(
                1 << b,
                bits_per_byte(float(nats[b]), float(n_bytes[b])),
                int(n_tokens[b]),
                bits_per_byte(math.sqrt(float(spread[b])), float(n_bytes[b])),
            )
            for b in range(N_BINS)
            if n_bytes[b] > 0
        ]


class DocumentPosition:
    """Follows a stream of documents, part by part, and tells how far each token is from its document's start.

    Args:
        bos_id: The token that starts a document.
    """

    def __init__(self, bos_id: int) -> None:
        self._bos_id = bos_id
        self._position = 0

    def of_targets(self, tokens: Tensor) -> Tensor:
        """How many tokens of its own document stand before each token of the next part.

        Args:
            tokens: (n+1,) int64; the first one is the last of the part before, and is not counted for itself.

        Returns:
            (n,) int64, for tokens[1:]. The BOS at a document's start counts; a BOS itself is predicted from the
            document before it, and so belongs to that.
        """
        tokens = tokens.cpu()
        place = torch.arange(tokens.numel())
        start = torch.where(tokens == self._bos_id, place, -1).cummax(0).values
        since = torch.where(start >= 0, place - start, place + self._position) + 1
        # tokens[n] comes again as the first of the next part.
        self._position = int(since[-1]) - 1
        return since[:-1]
