"""The convolution as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T sequence, E channels, W taps. Tensors of the pair:
    forward(x, weight, bias, silu, state, doc_position) -> y (B, T, E), the last W-1 inputs (B, E, W-1), both in x's
        dtype
    backward(g_y, g_final, x, weight, bias, silu, state, doc_position) -> the gradients of x, weight, bias and state
doc_position (B, T) int32 is absent where every sequence is one document. Backward recomputes what stood before the
activation, so that only inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hymba_lightning.ops.operators import Contract, make_operator

CONTRACT = Contract(
    operands="Tensor x, Tensor weight, Tensor bias, bool silu, Tensor state, Tensor? doc_position=None",
    results="y final",
    n_differentiable=2,
    kept="x weight bias silu state doc_position",
    gradients="x weight bias state",
)


def make_conv_op(name: str, forward: Callable, backward: Callable, into: str | None = None) -> Callable:
    """The differentiable operator hymba::`name` of a pair; `into` as in `make_operator`."""

    def shapes(x, weight, bias, silu, state, doc_position=None):
        return tuple(torch.empty(tensor.shape, dtype=x.dtype, device=x.device) for tensor in (x, state))

    return make_operator(name, CONTRACT, forward, backward, shapes, into)


def last_inputs(x_BTE: Tensor, state_BEW1: Tensor) -> Tensor:
    """The last W-1 inputs (B, E, W-1), oldest first, of the old state followed by x."""
    kept = state_BEW1.size(2)
    recent_BEX = x_BTE[:, max(0, x_BTE.size(1) - kept) :].transpose(1, 2)
    older = kept - recent_BEX.size(2)
    return torch.cat([state_BEW1[:, :, kept - older :].to(x_BTE.dtype), recent_BEX], dim=2)
