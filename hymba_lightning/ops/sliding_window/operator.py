"""Attention as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim. Tensors of the pair:
    forward(q, k, v, window, scale, doc_position) -> out (B, T, H, K), and log Σ exp of the scores (B, H, T) where
        backward wants them
    backward(g_out, q, k, v[, out, log_sums], window, scale, doc_position) -> the gradients of q, k and v
doc_position (B, T) int32 is absent where every sequence is one document; a pair with log_sums never gets it.
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


def make_attention_op(name: str, forward: Callable, backward: Callable, log_sums: bool = False) -> Callable:
    """The differentiable operator hymba::`name` of a pair; `log_sums`: forward returns them, backward takes them."""

    def shapes(q, k, v, window, scale, doc_position=None):  # type: ignore[no-untyped-def]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return (out, _log_sums(q)) if log_sums else out

    return make_operator(name, WITH_LOG_SUMS if log_sums else CONTRACT, forward, backward, shapes)


def _log_sums(q_BTHK: Tensor) -> Tensor:
    batch, length, heads, _ = q_BTHK.shape
    return torch.empty((batch, heads, length), dtype=torch.float32, device=q_BTHK.device)
