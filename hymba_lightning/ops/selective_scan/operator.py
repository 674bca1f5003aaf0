"""The scan as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T sequence, E channels, N states, C chunks. Tensors of the pair:
    forward(u, dt, A, B, C, D, z, dt_bias, initial_state, doc_position) -> out (B, T, E), final state (B, E, N), starts
        (B, C, N, E)
    backward(g_out, g_final, u, dt, A, B, C, D, z, dt_bias, starts, doc_position) -> the nine gradients in the order of
        the inputs
`starts` holds the state before each chunk; backward recomputes the others from it. An absent z has an empty gradient;
doc_position (B, T) int32, which has none, is absent where every sequence is one document.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hymba_lightning.ops.operators import Contract, make_operator

OPERANDS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor dt_bias"
CONTRACT = Contract(
    operands=f"{OPERANDS}, Tensor initial_state, Tensor? doc_position=None",
    results="out final starts",
    n_differentiable=2,
    kept="u dt A B C D z dt_bias starts doc_position",
    gradients="u dt A B C D z dt_bias initial_state=final",
)


def n_chunks(length: int, chunk: int) -> int:
    """How many chunks of `chunk` tokens cover `length`."""
    return -(-length // chunk)


def make_scan_op(name: str, forward: Callable, backward: Callable, chunk: int) -> Callable:
    """The differentiable operator hymba::`name` of a pair whose chunks have `chunk` tokens."""

    def shapes(u, dt, A, B, C, D, z, dt_bias, initial_state, doc_position=None):  # type: ignore[no-untyped-def]
        starts = (u.size(0), n_chunks(u.size(1), chunk), A.size(1), u.size(2))
        return torch.empty_like(u, memory_format=torch.contiguous_format), *_float32(u, initial_state.shape, starts)

    return make_operator(name, CONTRACT, forward, backward, shapes)


def _float32(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes]
