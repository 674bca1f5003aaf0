"""How long the recurrent state remembers: the time in which a channel's state falls to 1/e, on real text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.probes.cuts import mixers_of

QUANTILES = (0.1, 0.5, 0.9, 0.99)


class Memory(NamedTuple):
    """One layer's decay times over all its channels and states."""

    layer: int
    tokens: list[float]
    """At QUANTILES, in tokens."""
    longest: float


@torch.no_grad()
def decay_times(net: Hymba, tokens: Tensor) -> list[Memory]:
    """Of every layer, with the time steps averaged over tokens (T,) of real text.

    A layer whose mixer does not tell its decays is left out.
    """
    caught: dict[int, Tensor] = {}
    mixers = mixers_of(net)
    hooks = [
        mixer.register_forward_pre_hook(lambda _, args, index=index: caught.__setitem__(index, args[0]))
        for index, mixer in enumerate(mixers)
    ]
    try:
        net.hidden(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for index, mixer in enumerate(mixers):
        times = mixer.decay_times(caught[index])
        if times is not None:
            times = times.float().flatten().cpu()
            at = torch.quantile(times, torch.tensor(QUANTILES)).tolist()
            found.append(Memory(index, at, float(times.max())))
    return found
