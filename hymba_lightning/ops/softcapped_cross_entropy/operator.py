"""The loss as an operator: what a pair of functions, forward and backward, has to take and give.

N tokens, V vocabulary. Tensors of the pair:
    forward(logits (N, V), targets (N,), cap) -> the loss in nats and log Σ exp of the capped logits, (N,) float32 both
    backward(g_nats (N,), logits, targets, log_sums (N,), cap) -> the gradient of the logits, in their dtype
Backward recomputes the probabilities, so that the logits as they came and one number a token are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hymba_lightning.ops.operators import Contract, make_operator

CONTRACT = Contract(
    operands="Tensor logits, Tensor targets, float cap",
    results="nats log_sums",
    n_differentiable=1,
    kept="logits targets log_sums cap",
    gradients="logits",
)


def make_loss_op(name: str, forward: Callable, backward: Callable) -> Callable:
    """The operator hymba::`name` of a pair, differentiable through the loss."""

    def shapes(logits, targets, cap):
        return tuple(torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))

    return make_operator(name, CONTRACT, forward, backward, shapes)
