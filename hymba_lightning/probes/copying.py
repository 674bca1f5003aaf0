"""How much a passage gains from having stood in the text before, by distance: how far back a network can copy from.

The measure is Khandelwal et al.'s of what a context is used for, "Sharp Nearby, Fuzzy Far Away" (arXiv:1805.04623), on
text of its own that is repeated as it stands.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.probes.cuts import nats_of


class Copy(NamedTuple):
    """Repetitions whose first token stands `distance` tokens after the passage's."""

    distance: int
    passages: int
    gain: float
    """Nats a token that the repeated passage is cheaper than where another passage stood in the first one's place."""
    error: float
    """Its standard error over the passages."""


def distances(length: int, passage: int) -> list[int]:
    """Powers of two from 2·passage up, as far as a sequence of `length` tokens goes, and the farthest there is."""
    farthest = length - passage
    powers = [1 << b for b in range(64) if 2 * passage <= 1 << b < farthest]
    return [*powers, farthest] if farthest >= 2 * passage else powers


def copy_gain(
    net: Hymba, stream: Tensor, length: int, *, passage: int = 64, passages: int = 8, seed: int = 0
) -> list[Copy]:
    """Gains at every distance of `distances`.

    Args:
        net: The network.
        stream: Tokens (n,) of real text on its device, from which passages and what stands between are drawn.
        length: Most tokens of a sequence.
        passage: Tokens of a passage. The first is not scored: nothing says that it comes.
        passages: How many, at least 2, each with a text of its own.
        seed: Draws the same places again.

    Raises:
        ValueError: too short a stream, or fewer than two passages.
    """
    if passages < 2:
        raise ValueError("standard errors need at least 2 passages")
    if stream.numel() <= length + 2 * passage:
        raise ValueError(
            f"{stream.numel():,} tokens of text are too few to copy over {length:,}: give more, or a shorter seq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for distance in distances(length, passage):
        gains = []
        for _ in range(passages):
            places = torch.randint(0, stream.numel() - length - passage, (3,), generator=generator).tolist()
            text = stream[places[0] : places[0] + distance + passage].clone()
            repeated = stream[places[1] : places[1] + passage]
            other = stream[places[2] : places[2] + passage]
            text[distance:] = repeated
            text[:passage] = repeated
            control = text.clone()
            control[:passage] = other
            nats = nats_of(net, torch.stack([text, control]))[:, 1 - passage :].double().mean(1)
            gains.append(float(nats[1] - nats[0]))
        error = statistics.stdev(gains) / len(gains) ** 0.5
        found.append(Copy(distance, passages, statistics.fmean(gains), error))
    return found
