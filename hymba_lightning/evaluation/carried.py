"""Carried evaluation: the stream is one sequence, read in pieces that hand the network's state on.

B prompts, n targets, T tokens of a piece, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.evaluation.score import ScoredTokens, sum_over_ranks, world
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState

# Rotary angles are float32: past this position the state is turned back to 0, so that they keep their digits at any
# length of text.
REBASE_AT = 1 << 16


@torch.no_grad()
def read(net: Hymba, tokens: Tensor, state: HymbaState | None, piece_tokens: int) -> tuple[Tensor, HymbaState]:
    """Feeds tokens (B, n), n >= 1, that follow `state`, in pieces, whatever n.

    Returns the last tokens' logits (B, V) and the state after them.
    """
    for piece in tokens.split(piece_tokens, dim=1):
        hidden_BTD, after = net.hidden(piece, state, return_state=True)
        assert after is not None
        state = net.compact(after, REBASE_AT)
    assert state is not None
    return net.logits(hidden_BTD[:, -1:])[:, 0], state


@torch.no_grad()
def score_onward(
    net: Hymba,
    tokens: Tensor,
    state: HymbaState | None,
    piece_tokens: int,
    forward: Callable[..., Any] | None = None,
) -> tuple[Tensor, HymbaState | None]:
    """Nats (n,) float32 of tokens[1:] of tokens (n+1,), which follow `state`; and the state after tokens[n-1].

    `forward` is called in the network's place.
    """
    nats = [torch.empty(0, device=tokens.device)]
    for inputs, targets in zip(tokens[:-1].split(piece_tokens), tokens[1:].split(piece_tokens), strict=True):
        if inputs.numel():
            nats_BT, state = (forward or net)(
                inputs[None], targets[None], state=state, return_state=True, reduction="none"
            )
            state = net.compact(state, REBASE_AT)
            nats.append(nats_BT[0])
    return torch.cat(nats), state


@dataclass
class CarriedScorer:
    """Scores consecutive parts of a stream, each token given all that came before.

    On one rank the state goes on from part to part: a token sees everything since the start of the stream (or, after
    an update with `rewarm`, at least the last `warm_tokens`). On several ranks a part is cut into one contiguous span
    for each, and a span's state is made from the `warm_tokens` tokens before it: a token then sees at least
    min(warm_tokens, all) tokens, not all. Every rank gets every nat.

    Raises ValueError for a network with global layers, whose state would grow with the text.
    """

    net: Hymba
    piece_tokens: int
    warm_tokens: int
    rewarm: bool
    forward: Callable[..., Any] | None = None
    forwards_per_score: float = field(default=1.0, init=False)
    _state: HymbaState | None = field(default=None, init=False)
    _seen: int = field(default=0, init=False)  # tokens that _state has read
    _before: Tensor | None = field(default=None, init=False)  # up to warm_tokens tokens before the next part

    def __post_init__(self) -> None:
        if self.net.config.global_layer_set():
            raise ValueError(
                "ttt.mode 'carried' needs a network whose state does not grow, and net.global_layers="
                f"{self.net.config.global_layers!r} keeps every key: use mode 'cold' or 'sliding'"
            )

    def weights_changed(self) -> None:
        """Told after the network was trained. Where the state is to be made anew after an update, drops it."""
        if self.rewarm:
            self._state = None

    def score(self, tokens: Tensor) -> ScoredTokens:
        """tokens (n+1,), of which the first was the last of the part before; scores tokens[1:]."""
        was_training = self.net.training
        self.net.eval()
        before = tokens[:0] if self._before is None else self._before
        stream, n = torch.cat([before, tokens]), tokens.numel() - 1
        if world()[1] == 1:
            nats, context = self._score_on(stream, before.numel(), n)
        else:
            nats, context = self._score_spans(stream, before.numel(), n)
        self._before = stream[max(stream.numel() - 1 - self.warm_tokens, 0) : -1].clone()
        self.net.train(was_training)
        return ScoredTokens(nats, context)

    def _score_on(self, stream: Tensor, first: int, n: int) -> tuple[Tensor, Tensor]:
        if self._state is None:
            self._seen = first
            if first:
                self._state = read(self.net, stream[None, :first], None, self.piece_tokens)[1]
        nats, self._state = score_onward(self.net, stream[first:], self._state, self.piece_tokens, self.forward)
        context = torch.arange(self._seen + 1, self._seen + n + 1)
        self._seen += n
        return nats, context

    def _score_spans(self, stream: Tensor, first: int, n: int) -> tuple[Tensor, Tensor]:
        rank, size = world()
        nats, context = torch.zeros(n, device=stream.device), torch.zeros(n, dtype=torch.int64)
        for other in range(size):
            start, stop = first + n * other // size, first + n * (other + 1) // size
            warm_from = max(start - self.warm_tokens, 0)
            context[start - first : stop - first] = torch.arange(start - warm_from + 1, stop - warm_from + 1)
            if other != rank or start == stop:
                continue
            state = None
            if warm_from < start:
                state = read(self.net, stream[None, warm_from:start], None, self.piece_tokens)[1]
            nats[start - first : stop - first] = score_onward(
                self.net, stream[start : stop + 1], state, self.piece_tokens, self.forward
            )[0]
        return sum_over_ranks(nats), context
