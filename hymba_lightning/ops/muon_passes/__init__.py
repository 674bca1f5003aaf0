"""Muon's passes over parameters, before and after the products of Newton-Schulz: one contract, several backends.

A bank has matrices of R rows and C columns, R <= C, of which tall parameters are transposed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hymba_lightning.ops import registry

registry.register_folder("muon_passes", __name__)
available_backends = functools.partial(registry.available_backends, "muon_passes")


@dataclass(frozen=True)
class Bank:
    """Matrices with one shape after transposition; a rank works on `share` consecutive ones of them."""

    rows: int
    columns: int
    members: tuple[int, ...]
    """Indices into the parameter list: the ones stored as (R, C) first, then those to be transposed."""
    n_upright: int
    share: int
    offset: int
    """Where the bank's share starts in a rank's flat buffer of updates."""

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def plan_banks(shapes: Sequence[torch.Size], world_size: int) -> tuple[list[Bank], int]:
    """Group matrices by shape and share every bank out over ranks.

    Returns:
        the banks, and the number of elements in a rank's flat buffer.

    Raises:
        ValueError: a parameter is not a matrix.
    """
    by_shape: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for index, shape in enumerate(shapes):
        if len(shape) != 2:
            raise ValueError(f"Muon takes matrices; parameter {index} of its group has shape {tuple(shape)}")
        upright, turned = by_shape.setdefault((min(shape), max(shape)), ([], []))
        (upright if shape[0] <= shape[1] else turned).append(index)
    banks, offset = [], 0
    for (rows, columns), (upright, turned) in by_shape.items():
        share = math.ceil((len(upright) + len(turned)) / world_size)
        banks.append(Bank(rows, columns, (*upright, *turned), len(upright), share, offset))
        offset += share * rows * columns
    return banks, offset


@dataclass(frozen=True)
class Update:
    """One update: the tensors that it reads and changes, all float32 but the parameters, and its numbers."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool = True
    row_normalize: bool = False
    cautious: bool = False
    neuron_beta: float = 0.0
    neurons: list[Tensor] = field(default_factory=list)


class Passes(Protocol):
    """The passes of one update, made from it and from the banks of its parameters."""

    def momentum(self) -> None:
        """m <- μ m + g for all parameters. Comes first."""

    def bank(self, bank: Bank, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """(last − first, R, C) in `dtype`: what is to be orthogonalised of members `first` to `last`, their rows of
        length 1 under `row_normalize`, each matrix divided by its Frobenius norm."""

    def apply(self, bank: Bank, shares_WX: Tensor) -> None:
        """Decays the bank's parameters and moves them by their orthogonalised matrices.

        Args:
            bank: whose parameters.
            shares_WX: (ranks, share · R · C), the rows contiguous: matrix i is number i % share of row i // share.
        """


def passes(update: Update, banks: Sequence[Bank], *, backend: str = "auto") -> Passes:
    """Raises ValueError for an unknown backend, BackendUnavailableError for a named one that cannot serve the call."""
    plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in (*update.params, *update.momenta))
    found: Callable[..., Any] = registry.implementation(
        "muon_passes", backend, update.params[0].device.type, plain=plain, neurons=update.neuron_beta > 0
    )
    return found(update, banks)
