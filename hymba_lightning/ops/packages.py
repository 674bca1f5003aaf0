"""Calling another package's autograd.Function from inside one of our operators, where autograd does not record."""

from __future__ import annotations

from torch import Tensor


class Context:
    """Stands in for autograd's context, so that a Function's forward and backward can be called one after the other."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps the tensors for the Function's backward."""
        self.saved_tensors = tensors
