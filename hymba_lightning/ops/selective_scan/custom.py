"""Makes a pair of plain functions, forward and backward, a torch.library operator that compiles into one graph.

B batch, T sequence, E channels, N states, C chunks. Tensors of the pair:
    forward(u, dt, A, B, C, D, z, dt_bias, initial_state) -> out (B, T, E), final state (B, E, N), starts (B, C, N, E)
    backward(g_out, g_final, u, dt, A, B, C, D, z, dt_bias, starts) -> the nine gradients in the order of the inputs
`starts` holds the state before each chunk; backward recomputes the others from it. An absent z has an empty gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def n_chunks(length: int, chunk: int) -> int:
    """How many chunks of `chunk` tokens cover `length`."""
    return -(-length // chunk)


def make_scan_op(name: str, forward: Callable, backward: Callable, chunk: int) -> Callable:
    """Registers hymba::`name` and hymba::`name`_backward and returns the differentiable operator."""

    @torch.library.custom_op(f"hymba::{name}", mutates_args=())
    def scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        dt_bias: Tensor,
        initial_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(u, dt, A, B, C, D, z, dt_bias, initial_state)

    @scan.register_fake
    def _(u, dt, A, B, C, D, z, dt_bias, initial_state):  # type: ignore[no-untyped-def]
        batch, length, channels = u.shape
        starts = (batch, n_chunks(length, chunk), A.size(1), channels)
        return (
            torch.empty(u.shape, dtype=u.dtype, device=u.device),
            torch.empty(initial_state.shape, dtype=torch.float32, device=u.device),
            torch.empty(starts, dtype=torch.float32, device=u.device),
        )

    @torch.library.custom_op(f"hymba::{name}_backward", mutates_args=())
    def scan_backward(
        g_out: Tensor,
        g_final: Tensor,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        dt_bias: Tensor,
        starts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return backward(g_out, g_final, u, dt, A, B, C, D, z, dt_bias, starts)

    @scan_backward.register_fake
    def _(g_out, g_final, u, dt, A, B, C, D, z, dt_bias, starts):  # type: ignore[no-untyped-def]
        operands = (u, dt, A, B, C, D, u.new_empty(0) if z is None else z, dt_bias)
        return (
            *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in operands),
            torch.empty(g_final.shape, dtype=torch.float32, device=u.device),
        )

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, dt_bias, _ = inputs
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, output[2])
        # Else autograd would fill a gradient of zeros for the chunk states.
        ctx.set_materialize_grads(False)

    def differentiate(ctx, g_out, g_final, g_starts):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, dt_bias, starts = ctx.saved_tensors
        if g_out is None:
            g_out = torch.zeros_like(u)
        if g_final is None:
            g_final = A.new_zeros(u.size(0), *A.shape, dtype=torch.float32)
        gradients = scan_backward(g_out, g_final, u, dt, A, B, C, D, z, dt_bias, starts)
        return (*gradients[:6], None if z is None else gradients[6], *gradients[7:])

    scan.register_autograd(differentiate, setup_context=setup_context)
    return scan
