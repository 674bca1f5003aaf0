"""Takes a part of its memory away from a network for the time of a `with` block.

N sequences, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.model.mixer import HybridMixer


def mixers_of(net: Hymba) -> list[HybridMixer]:
    """The mixer of every block, in order."""
    return [module for module in net.modules() if isinstance(module, HybridMixer)]


@contextmanager
def without_attention(net: Hymba) -> Iterator[None]:
    """Attention's branch gives zeros in every layer."""
    with _zeroed([mixer.silencing()[0] for mixer in mixers_of(net)]):
        yield


@contextmanager
def without_recurrence(net: Hymba) -> Iterator[None]:
    """The recurrent branch gives zeros in every layer."""
    with _zeroed([mixer.silencing()[1] for mixer in mixers_of(net)]):
        yield


@contextmanager
def narrower_window(net: Hymba, window: int) -> Iterator[None]:
    """No layer's attention sees more than the last `window` tokens, itself included. Raises ValueError under 1."""
    if window < 1:
        raise ValueError(f"a window of {window} tokens: it must be at least 1")
    mixers = mixers_of(net)
    before = [mixer.window for mixer in mixers]
    for mixer in mixers:
        mixer.window = window if mixer.window is None else min(mixer.window, window)
    try:
        yield
    finally:
        for mixer, old in zip(mixers, before, strict=True):
            mixer.window = old


@contextmanager
def _zeroed(parts: list[Tensor]) -> Iterator[None]:
    """`parts` of the weights, which may be views of one another, are zero inside."""
    with torch.no_grad():
        saved = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for part, old in zip(parts, saved, strict=True):
                part.copy_(old)


@torch.no_grad()
def nats_of(net: Hymba, tokens_NT1: Tensor, *, forget_every: int | None = None, rows: int = 1) -> Tensor:
    """Nats (N, T) float32 of tokens[:, 1:] of tokens (N, T+1), each sequence from an empty state.

    Args:
        net: The network; scored as it is, in eval mode or not.
        tokens_NT1: Token ids on the network's device.
        forget_every: The recurrent branch's state is made empty after so many tokens, while attention goes on seeing
            what its window holds; None never does.
        rows: Sequences in one forward pass.
    """
    found = []
    for tokens in tokens_NT1.split(rows):
        piece = forget_every or tokens.size(1)
        state, nats = None, []
        for inputs, targets in zip(tokens[:, :-1].split(piece, 1), tokens[:, 1:].split(piece, 1), strict=True):
            nats_BT, state = net(inputs, targets, state=state, return_state=True, reduction="none")
            nats.append(nats_BT.float())
            if forget_every is not None:
                layers = [mixer.forget(layer) for mixer, layer in zip(mixers_of(net), state.layers, strict=True)]
                state = state._replace(layers=layers)
        found.append(torch.cat(nats, 1))
    return torch.cat(found)
