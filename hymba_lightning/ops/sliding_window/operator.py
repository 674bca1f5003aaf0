"""Attention as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim. Tensors of the pair:
    forward(q, k, v, window, scale, doc_position) -> out (B, T, H, K), and log Σ exp of the scores (B, H, T) where
        backward wants them
    backward(g_out, q, k, v[, out, log_sums], window, scale[, doc_position]) -> the gradients of q, k and v
doc_position (B, T) int32 is absent where every sequence is one document, and where a pair refuses others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hymba_lightning.ops.operators import Contract, make_operator

CONTRACT = Contract(
    operands="Tensor q, Tensor k, Tensor v, int window, float scale, Tensor? doc_position=None",
    results="out",
    n_differentiable=1,
    kept="q k v window scale doc_position",
    gradients="q k v",
)
WITH_LOG_SUMS = CONTRACT._replace(results="out log_sums", kept="q k v out log_sums window scale")
WITH_LOG_SUMS_AND_DOCUMENTS = WITH_LOG_SUMS._replace(kept=f"{WITH_LOG_SUMS.kept} doc_position")


def make_attention_op(
    name: str, forward: Callable, backward: Callable, contract: Contract = CONTRACT, into: str | None = None
) -> Callable:
    """The differentiable operator hymba::`name` of a pair that keeps to `contract`, one of those above."""

    def shapes(q, k, v, window, scale, doc_position=None):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return (out, _log_sums(q)) if contract is not CONTRACT else out

    return make_operator(name, contract, forward, backward, shapes, into)


def _log_sums(q_BTHK: Tensor) -> Tensor:
    batch, length, heads, _ = q_BTHK.shape
    return torch.empty((batch, heads, length), dtype=torch.float32, device=q_BTHK.device)
