"""Makes a pair of plain functions, forward and backward, a torch.library operator that compiles into one graph.

N tokens, V vocabulary. Tensors of the pair:
    forward(logits (N, V), targets (N,), cap) -> the loss in nats and log Σ exp of the capped logits, (N,) float32 both
    backward(g_nats (N,), logits, targets, log_sums (N,), cap) -> the gradient of the logits, in their dtype
Backward recomputes the probabilities, so that the logits as they came and one number a token are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def make_loss_op(name: str, forward: Callable, backward: Callable) -> Callable:
    """Registers hymba::`name` and hymba::`name`_backward and returns the operator, differentiable through the loss."""

    @torch.library.custom_op(f"hymba::{name}", mutates_args=())
    def loss(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        return forward(logits, targets, cap)

    @loss.register_fake
    def _(logits, targets, cap):  # type: ignore[no-untyped-def]
        nats = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        return nats, torch.empty_like(nats)

    @torch.library.custom_op(f"hymba::{name}_backward", mutates_args=())
    def loss_backward(g_nats: Tensor, logits: Tensor, targets: Tensor, log_sums: Tensor, cap: float) -> Tensor:
        return backward(g_nats, logits, targets, log_sums, cap)

    @loss_backward.register_fake
    def _(g_nats, logits, targets, log_sums, cap):  # type: ignore[no-untyped-def]
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, targets, ctx.cap = inputs
        ctx.save_for_backward(logits, targets, output[1])
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, g_nats, _):  # type: ignore[no-untyped-def]
        return loss_backward(g_nats, *ctx.saved_tensors, ctx.cap), None, None

    loss.register_autograd(differentiate, setup_context=setup_context)
    return loss
