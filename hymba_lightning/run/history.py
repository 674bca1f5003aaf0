"""The history of a training: rows for plots and logs, and what was trained so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainRow:
    """One line of the training history."""

    step: int
    seconds: float
    tokens: int
    loss: float
    lr_scale: float
    tokens_per_s: float


@dataclass(frozen=True)
class ValRow:
    """One validation during training."""

    step: int
    seconds: float
    tokens: int
    loss: float
    bpb: float


@dataclass
class History:
    """Rows, and the tokens trained on over all ranks."""

    train: list[TrainRow] = field(default_factory=list)
    val: list[ValRow] = field(default_factory=list)
    tokens: int = 0
    """Tokens of all finished optimizer steps, over all ranks."""

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Content of history.json."""
        return {
            "train": [dataclasses.asdict(row) for row in self.train],
            "val": [dataclasses.asdict(row) for row in self.val],
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "train": [dataclasses.astuple(row) for row in self.train],
            "val": [dataclasses.astuple(row) for row in self.val],
            "tokens": self.tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.train = [TrainRow(*row) for row in state["train"]]
        self.val = [ValRow(*row) for row in state["val"]]
        self.tokens = int(state["tokens"])


class Losses:
    """Mean of the training losses since it was last asked for, without waiting for a GPU."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._taken = 0
        self.count = 0
        """Losses so far."""

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, a 0-dim tensor in nats per token."""
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
        self.count += 1

    def take(self) -> Tensor | None:
        """This rank's mean loss (0-dim) since the last call; None if there was no step."""
        if self._sum is None:
            return None
        mean = self._sum / (self.count - self._taken)
        self._sum, self._taken = None, self.count
        return mean.to(torch.float32)
