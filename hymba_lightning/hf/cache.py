"""Our state as the cache of `transformers`' generation: constant in size, whatever the length of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hymba_lightning.generation.rows import select
from hymba_lightning.generation.steps import Steps
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.hymba import HymbaState


class HymbaCache(Cache):
    """What the network remembers of all rows, and how many columns (padding included) were read.

    It cannot be cropped: a state does not know its past.
    """

    def __init__(self, state: HymbaState | None = None, columns: int = 0, network: HymbaConfig | None = None) -> None:
        super().__init__(layers=[])
        self.network = network
        """Config of the network that read it."""
        self._state = state
        self._steps: Steps | None = None
        self.columns = columns

    @property
    def state(self) -> HymbaState | None:
        """Of all rows; None before anything was read."""
        return self._state if self._steps is None else self._steps.state

    @state.setter
    def state(self, state: HymbaState | None) -> None:
        self._state = state
        if self._steps is not None:
            self._steps.state = state

    def step(self, net: Hymba, ids_B1: Tensor) -> Tensor:
        """One more token of each row; returns the last block's output (B, 1, D)."""
        if self._steps is None or self._steps.net is not net:
            self._steps, self._state = Steps(net, self.state), None
        return self._steps.hidden(ids_B1)

    def renew(self) -> None:
        """Makes anew, with the next token, whatever was made of the network, which may be another one by then."""
        if self._steps is not None:
            self._steps.renew()

    def _held(self) -> HymbaState | None:
        return self._state if self._steps is None else self._steps.held

    def __reduce__(self) -> tuple[type[HymbaCache], tuple[HymbaState | None, int, HymbaConfig | None]]:
        # For copies and files: the network, and a recorded graph, are no part of what was read.
        return HymbaCache, (self.state, self.columns, self.network)

    def __repr__(self) -> str:
        return f"HymbaCache({self.columns} columns)"

    def __len__(self) -> int:
        held = self._held()
        return 0 if held is None else len(held.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None that it would end at."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces each row by the row that `beam_idx` (B,) names, as beam search asks."""
        state = self.state
        if state is not None:
            self.state = select(state, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        state = self.state
        if state is not None:
            rows = torch.arange(state.last_id.size(0), device=state.last_id.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.columns = None, 0

    def crop(self, *args: Any) -> None:
        """Raises ValueError: assisted generation and other ways that take tokens back are not for this network."""
        raise ValueError("a Hymba's state cannot be cropped: generate without an assistant model")

    @property
    def batch_size(self) -> int:
        """Rows."""
        state = self._state
        rows = self._steps.rows if self._steps is not None else None if state is None else state.last_id.size(0)
        return -1 if rows is None else rows

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.batch_size >= 0

    @property
    def is_compileable(self) -> bool:
        """False: its shapes grow until the window is full."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Of one layer that is not linear attention alone."""
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        """Of one layer, which is no layer of theirs."""
        return [False]
