"""Muon's passes by torch's operators on lists and stacks of matrices. n matrices, R rows, C columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hymba_lightning.ops.registry import Backend

if TYPE_CHECKING:
    from hymba_lightning.ops.muon_passes import Bank, Update

EPS = 1e-7


def normalized(bank_nRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Every matrix divided by its Frobenius norm, in `dtype`."""
    norm_n11 = torch.linalg.vector_norm(bank_nRC, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return (bank_nRC / (norm_n11 + EPS)).to(dtype)


class TorchPasses:
    """See `Passes`."""

    def __init__(self, update: Update, banks: Sequence[Bank]) -> None:
        self._update = update
        self._directions: list[Tensor] = []

    def momentum(self) -> None:
        u = self._update
        torch._foreach_mul_(u.momenta, u.momentum)
        torch._foreach_add_(u.momenta, u.grads)
        self._directions = list(torch._foreach_add(u.grads, u.momenta, alpha=u.momentum)) if u.nesterov else u.momenta
        if not u.cautious:
            torch._foreach_mul_(u.params, 1.0 - u.lr * u.weight_decay)

    def bank(self, bank: Bank, first: int, last: int, dtype: torch.dtype) -> Tensor:
        upright = max(min(bank.n_upright, last) - first, 0)
        matrices = [self._directions[i] for i in bank.members[first:last]]
        bank_nRC = torch.stack(matrices[:upright] + [matrix.mT for matrix in matrices[upright:]])
        if self._update.row_normalize:
            # A row of the parameter is a column of a transposed member.
            for part, dim in ((bank_nRC[:upright], -1), (bank_nRC[upright:], -2)):
                part /= torch.linalg.vector_norm(part, dim=dim, keepdim=True) + EPS
        return normalized(bank_nRC, dtype)

    def apply(self, bank: Bank, shares_WX: Tensor) -> None:
        x_nRC = shares_WX.float().reshape(-1, bank.rows, bank.columns)
        upright, turned = bank.members[: bank.n_upright], bank.members[bank.n_upright :]
        if upright:
            self._move(upright, x_nRC[: len(upright)])
        if turned:
            self._move(turned, x_nRC[len(upright) : len(bank.members)].mT.contiguous())

    def _move(self, members: Sequence[int], updates_nrc: Tensor) -> None:
        u = self._update
        rows, columns = updates_nrc.shape[1:]
        scale = max(1.0, rows / columns) ** 0.5
        moved = [u.params[i] for i in members]
        if u.neuron_beta:
            updates_nrc = self._by_neuron(updates_nrc, [u.neurons[i] for i in members])
        if u.cautious and u.weight_decay:
            weights_nrc = torch.stack(moved)
            decayed_nrc = weights_nrc * (weights_nrc * updates_nrc > 0)
            torch._foreach_add_(moved, list(decayed_nrc.unbind()), alpha=-u.lr * u.weight_decay)
        torch._foreach_add_(moved, list(updates_nrc.unbind()), alpha=-u.lr * scale)

    def _by_neuron(self, updates_nrc: Tensor, moments: list[Tensor]) -> Tensor:
        """Updates (n, rows, columns) with their rows divided by the root of `moments`, which they enter first, and the
        norm of each matrix as before."""
        moments_nr1 = torch.stack(moments)
        moments_nr1.lerp_(updates_nrc.square().mean(-1, keepdim=True), 1 - self._update.neuron_beta)
        torch._foreach_copy_(moments, list(moments_nr1.unbind()))
        divided_nrc = updates_nrc / (moments_nr1.sqrt() + EPS)
        norms = [torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (updates_nrc, divided_nrc)]
        return divided_nrc * (norms[0] / (norms[1] + EPS))


def _load() -> Callable:
    return TorchPasses


BACKEND = Backend("operators on lists of matrices", _load, auto={"any": 10})
