"""Our state as the cache of `transformers`' generation: constant in size, whatever the length of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hymba_lightning.generation.rows import select
from hymba_lightning.model.hymba import HymbaState


class HymbaCache(Cache):
    """What the network remembers of all rows, and how many columns (padding included) were read.

    It cannot be cropped: a state does not know its past.
    """

    def __init__(self, state: HymbaState | None = None, columns: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = columns

    def __repr__(self) -> str:
        return f"HymbaCache({self.columns} columns)"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None that it would end at."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces each row by the row that `beam_idx` (B,) names, as beam search asks."""
        if self.state is not None:
            self.state = select(self.state, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.last_id.device)
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
        return -1 if self.state is None else self.state.last_id.size(0)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

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
