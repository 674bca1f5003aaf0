"""Loss by position, of the whole network and with parts of its memory taken away.

N sequences, T tokens of each.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.probes import cuts
from hymba_lightning.units import bits_per_byte

# Tokens after which the recurrent state is emptied, and windows that attention is cut to, where they are short enough.
FORGET_EVERY = (256, 1024, 4096, 16384)
WINDOWS = (16, 64, 256)


class Bin(NamedTuple):
    """Targets predicted from at_least … 2·at_least - 1 tokens."""

    at_least: int
    tokens: int
    bpb: float
    """Bits per byte."""
    error: float
    """Its standard error over the sequences."""
    worse: float
    """Bits per byte above the whole network's on the same targets."""
    worse_error: float
    """Its standard error over the sequences, paired."""


class Curve(NamedTuple):
    """One variant of the network."""

    name: str
    bpb: float
    """Over all positions."""
    worse: float
    worse_error: float
    bins: list[Bin]


def by_position(net: Hymba, tokens_NT1: Tensor, bytes_NT: Tensor, *, rows: int = 1) -> list[Curve]:
    """Curves of the whole network, without either branch, with the recurrent state emptied every so many tokens, and
    with shorter windows.

    Args:
        net: The network.
        tokens_NT1: N >= 2 sequences (N, T+1) on its device.
        bytes_NT: UTF-8 bytes of each target (N, T).
        rows: Sequences in one forward pass.

    Raises:
        ValueError: fewer than two sequences, whose spread would say nothing.
    """
    if len(tokens_NT1) < 2:
        raise ValueError("standard errors need at least 2 sequences")
    length = tokens_NT1.size(1) - 1
    bytes_NT = bytes_NT.double().cpu()
    whole_NT = cuts.nats_of(net, tokens_NT1, rows=rows).double().cpu()
    curves = [_curve("whole network", whole_NT, whole_NT, bytes_NT)]
    for name, cut, forget in _variants(net, length):
        with cut:
            nats_NT = cuts.nats_of(net, tokens_NT1, forget_every=forget, rows=rows)
        curves.append(_curve(name, nats_NT.double().cpu(), whole_NT, bytes_NT))
    return curves


def _variants(net: Hymba, length: int) -> list[tuple[str, AbstractContextManager[None], int | None]]:
    widest = max(length if mixer.window is None else mixer.window for mixer in cuts.mixers_of(net))
    forgetful = [(f"state emptied every {every:,}", nullcontext(), every) for every in FORGET_EVERY if every < length]
    narrow = [
        (f"window cut to {window}", cuts.narrower_window(net, window), None)
        for window in WINDOWS
        if window < min(widest, length)
    ]
    return [
        ("attention off", cuts.without_attention(net), None),
        ("recurrence off", cuts.without_recurrence(net), None),
        *forgetful,
        *narrow,
    ]


def _curve(name: str, nats_NT: Tensor, whole_NT: Tensor, bytes_NT: Tensor) -> Curve:
    context = torch.arange(1, nats_NT.size(1) + 1)
    starts = [1 << b for b in range(int(context[-1]).bit_length())]
    bins = []
    for start in starts:
        here = (context >= start) & (context < 2 * start)
        rates = [ratio(part_NT[:, here], bytes_NT[:, here]) for part_NT in (nats_NT, nats_NT - whole_NT)]
        bins.append(Bin(start, int(here.sum()) * len(nats_NT), *rates[0], *rates[1]))
    total, difference = ratio(nats_NT, bytes_NT), ratio(nats_NT - whole_NT, bytes_NT)
    return Curve(name, total[0], *difference, bins)


def ratio(nats_NX: Tensor, bytes_NX: Tensor) -> tuple[float, float]:
    """Bits per byte, Σnats/Σbytes over everything, and its standard error from the spread of the N sequences (Cochran,
    Sampling Techniques, 1977, section 6.3)."""
    nats_N, bytes_N = nats_NX.sum(1), bytes_NX.sum(1)
    n, total = len(nats_N), float(bytes_N.sum())
    if total == 0:
        return 0.0, 0.0
    nats = float(nats_N.sum())
    spread = float(((nats_N - nats / total * bytes_N) ** 2).sum())
    return bits_per_byte(nats, total), bits_per_byte(math.sqrt(spread * n / (n - 1)), total)
