"""Tokens → nats. Scores a piece of a token stream without touching the weights, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.units import bits_per_byte


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens. `bpb` and `loss` are ratios of sums, so scores of disjoint pieces add exactly."""

    nats: float
    n_tokens: int
    n_bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the text: Σ nats / (ln 2 · Σ bytes)."""
        return bits_per_byte(self.nats, self.n_bytes)


class ScoredTokens(NamedTuple):
    """What scoring a part of a stream gives."""

    nats: Tensor
    """(n,) float32, in order, on the network's device."""
    context: Tensor
    """(n,) int64 on the CPU: from how many tokens each target was predicted."""


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed in place over all ranks."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class Window:
    """One forward pass of a scoring plan: feed tokens[start:stop], score the targets first … stop (token positions)."""

    start: int
    stop: int
    first: int


def plan_windows(n_tokens: int, n_context: int, seq_len: int, stride: int) -> list[Window]:
    """Cuts n_tokens targets that follow n_context known tokens into forward passes of at most seq_len inputs.

    stride == seq_len scores cold sequences; a smaller one gives each target at least seq_len - stride tokens of context
    where the stream has them (sliding-window evaluation). Position 0 is the first context token; the target at
    position p is predicted from inputs up to p-1. Every target is in exactly one window.
    """
    windows = []
    for first in range(n_context, n_context + n_tokens, stride):
        stop = min(first + stride, n_context + n_tokens)
        # A full-length window even where the last stride is short: more context costs nothing.
        start = first - 1 if stride == seq_len else max(stop - 1 - seq_len, 0)
        windows.append(Window(start, stop, first))
    return windows


def group_by_shape(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batches of consecutive windows of equal length."""
    group: list[Window] = []
    for window in windows:
        same = group and (window.stop - window.start) == (group[0].stop - group[0].start)
        if group and (not same or len(group) == batch_size):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


@torch.no_grad()
def score_tokens(
    net: Hymba,
    tokens: Tensor,
    n_context: int,
    *,
    seq_len: int,
    stride: int,
    batch_size: int,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Nats (n,) float32 of tokens[n_context:], in order, on every rank.

    tokens (n_context + n,) int64 on the network's device, n_context >= 1. Windows are shared out over the ranks; each
    target is scored by one of them and the vectors are summed. `forward` is called in the network's place.
    """
    was_training = net.training
    net.eval()
    rank, size = world()
    n_tokens = tokens.numel() - n_context
    nats = torch.zeros(n_tokens, dtype=torch.float32, device=tokens.device)
    windows = plan_windows(n_tokens, n_context, seq_len, stride)
    mine = windows[len(windows) * rank // size : len(windows) * (rank + 1) // size]
    for group in group_by_shape(mine, batch_size):
        inputs = torch.stack([tokens[w.start : w.stop - 1] for w in group])
        targets = torch.stack([tokens[w.start + 1 : w.stop] for w in group])
        nats_BT = (forward or net)(inputs, targets, reduction="none")
        for row, window in zip(nats_BT, group, strict=True):
            scored = row[row.numel() - (window.stop - window.first) :]
            nats[window.first - n_context : window.stop - n_context] = scored
    net.train(was_training)
    return sum_over_ranks(nats)


@dataclass
class WindowScorer:
    """Scores consecutive parts of a stream in windows that each start from an empty state.

    stride == seq_len: cold sequences, cut anew in every part. A smaller stride: sliding windows, which reach back into
    the part before.
    """

    net: Hymba
    seq_len: int
    stride: int
    batch_size: int
    forward: Callable[..., Any] | None = None
    _before: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.stride > self.seq_len:
            raise ValueError(f"ttt.stride={self.stride} is over seq_len={self.seq_len}: tokens would be skipped")

    @property
    def forwards_per_score(self) -> float:
        """How often scoring passes over each token."""
        return self.seq_len / self.stride

    def weights_changed(self) -> None:
        """Told after the network was trained; does nothing, since no state is kept here."""

    def score(self, tokens: Tensor) -> ScoredTokens:
        """Scores tokens[1:] of tokens (n+1,); tokens[0] is the last token of the part before."""
        n = tokens.numel() - 1
        stream = tokens if self._before is None else torch.cat([self._before, tokens])
        n_context = stream.numel() - n
        nats = score_tokens(
            self.net,
            stream,
            n_context,
            seq_len=self.seq_len,
            stride=self.stride,
            batch_size=self.batch_size,
            forward=self.forward,
        )
        context = torch.cat(
            [
                torch.arange(w.first - w.start, w.stop - w.start)
                for w in plan_windows(n, n_context, self.seq_len, self.stride)
            ]
            or [torch.arange(0)]
        )
        if self.stride < self.seq_len:
            self._before = stream[max(stream.numel() - 1 - self.seq_len, 0) : -1].clone()
        return ScoredTokens(nats, context)
