"""The heads' norm and turn as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T sequence, H heads, K head_dim. Tensors of the pair:
    forward(x, gain, cos, sin, eps) -> out (B, T, H, K) in x's dtype
    backward(g_out, x, gain, cos, sin, eps) -> the gradients of x and of gain
gain (H,) is absent where it is 1. Backward recomputes the norm, so that only inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hymba_lightning.ops.operators import Contract, make_operator

CONTRACT = Contract(
    operands="Tensor x, Tensor? gain, Tensor cos, Tensor sin, float eps",
    results="out",
    n_differentiable=1,
    kept="x gain cos sin eps",
    gradients="x gain",
)


def make_rotary_op(name: str, forward: Callable, backward: Callable, into: str | None = None) -> Callable:
    """The differentiable operator hymba::`name` of a pair; `into` as in `make_operator`."""

    def shapes(x, gain, cos, sin, eps):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return make_operator(name, CONTRACT, forward, backward, shapes, into)
