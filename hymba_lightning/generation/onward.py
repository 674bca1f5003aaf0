"""Reads what follows a state: single tokens by the step made for them where there is one, else by the ordinary call."""

from __future__ import annotations

from torch import Tensor

from hymba_lightning.evaluation.carried import REBASE_AT, read
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.model.one_token import OneToken


class Onward:
    """Reads tokens (B, n) after `state`, which None is at a sequence's start; the weights must not change meanwhile.

    Args:
        net: The network.
        state: What it has read; it is left as it is.
        piece_tokens: Most tokens of an ordinary call.
    """

    def __init__(self, net: Hymba, state: HymbaState | None, piece_tokens: int) -> None:
        self._net, self._state, self._piece_tokens = net, state, piece_tokens
        self._step: OneToken | None = None
        self._steps = True
        """Single tokens have not turned out to need the ordinary call."""

    @property
    def state(self) -> HymbaState | None:
        """After all that was read."""
        return self._state if self._step is None else self._net.compact(self._step.state(), REBASE_AT)

    def read(self, ids_BT: Tensor) -> Tensor:
        """Returns the last tokens' logits (B, V)."""
        single = ids_BT.size(1) == 1
        if self._step is not None and not (single and self._step.position < REBASE_AT):
            self._state, self._step = self.state, None
        if self._step is None and self._steps and single and self._state is not None:
            self._step = OneToken.after(self._net, self._state)
            self._steps = self._step is not None
        if self._step is not None:
            return self._step.read(ids_BT)
        logits_BV, self._state = read(self._net, ids_BT, self._state, self._piece_tokens)
        return logits_BV
