"""Makes a pair of plain functions, forward and backward, a torch.library operator that compiles into one graph.

B batch, T sequence, E channels, W taps. Tensors of the pair:
    forward(x, weight, bias, silu, state) -> y (B, T, E), the last W-1 inputs (B, E, W-1), both in x's dtype
    backward(g_y, g_final, x, weight, bias, silu, state) -> the gradients of x, weight, bias and state
Backward recomputes what stood before the activation, so that only inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def make_conv_op(name: str, forward: Callable, backward: Callable) -> Callable:
    """Registers hymba::`name` and hymba::`name`_backward and returns the differentiable operator."""

    @torch.library.custom_op(f"hymba::{name}", mutates_args=())
    def conv(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
        return forward(x, weight, bias, silu, state)

    @conv.register_fake
    def _(x, weight, bias, silu, state):  # type: ignore[no-untyped-def]
        return (
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(state.shape, dtype=x.dtype, device=x.device),
        )

    @torch.library.custom_op(f"hymba::{name}_backward", mutates_args=())
    def conv_backward(
        g_y: Tensor, g_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(g_y, g_final, x, weight, bias, silu, state)

    @conv_backward.register_fake
    def _(g_y, g_final, x, weight, bias, silu, state):  # type: ignore[no-untyped-def]
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, weight, bias, state))

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, ctx.silu, state = inputs
        ctx.save_for_backward(x, weight, bias, state)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, g_y, g_final):  # type: ignore[no-untyped-def]
        x, weight, bias, state = ctx.saved_tensors
        if g_y is None:
            g_y = torch.zeros_like(x)
        if g_final is None:
            g_final = x.new_zeros(state.shape)
        g_x, g_weight, g_bias, g_state = conv_backward(g_y, g_final, x, weight, bias, ctx.silu, state)
        return g_x, g_weight, g_bias, None, g_state

    conv.register_autograd(differentiate, setup_context=setup_context)
    return conv


def last_inputs(x_BTE: Tensor, state_BEW1: Tensor) -> Tensor:
    """The last W-1 inputs (B, E, W-1), oldest first, of the old state followed by x."""
    kept = state_BEW1.size(2)
    recent_BEX = x_BTE[:, max(0, x_BTE.size(1) - kept) :].transpose(1, 2)
    older = kept - recent_BEX.size(2)
    return torch.cat([state_BEW1[:, :, kept - older :].to(x_BTE.dtype), recent_BEX], dim=2)
