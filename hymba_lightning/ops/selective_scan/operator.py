"""The scan as an operator: what a pair of functions, forward and backward, has to take and give.

B batch, T sequence, E channels, N states, C chunks. Tensors of the pair:
    forward(operands, initial_state, doc_position) -> out (B, T, E), final state (B, E, N), starts (B, C, N, E)
    backward(g_out, g_final, operands, starts, doc_position) -> the gradients of the operands and of the initial state
`starts` holds the state before each chunk; backward recomputes the others from it. An absent z has an empty gradient;
doc_position (B, T) int32, which has none, is absent where every sequence is one document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hymba_lightning.ops.operators import Contract, make_operator


class ScanOperands(NamedTuple):
    """What a scan is computed from, in the order of every operator; the first state and the documents come after."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    dt_bias: Tensor


COUNT = len(ScanOperands._fields)
NAMES = " ".join(ScanOperands._fields)
OPERANDS = ", ".join(f"Tensor{'?' * (name == 'z')} {name}" for name in ScanOperands._fields)
CONTRACT = Contract(
    operands=f"{OPERANDS}, Tensor initial_state, Tensor? doc_position=None",
    results="out final starts",
    n_differentiable=2,
    kept=f"{NAMES} starts doc_position",
    gradients=f"{NAMES} initial_state=final",
)


def n_chunks(length: int, chunk: int) -> int:
    """How many chunks of `chunk` tokens cover `length`."""
    return -(-length // chunk)


def make_scan_op(name: str, forward: Callable, backward: Callable, chunk: int, into: str | None = None) -> Callable:
    """The differentiable operator hymba::`name` of a pair whose chunks have `chunk` tokens; `into` as in
    `make_operator`."""

    def shapes(*given: Any) -> tuple[Tensor, ...]:
        scan, initial_state = ScanOperands(*given[:COUNT]), given[COUNT]
        starts = (scan.u.size(0), n_chunks(scan.u.size(1), chunk), scan.A.size(1), scan.u.size(2))
        out = torch.empty_like(scan.u, memory_format=torch.contiguous_format)
        return out, *_float32(scan.u, initial_state.shape, starts)

    return make_operator(
        name,
        CONTRACT,
        lambda *given: forward(ScanOperands(*given[:COUNT]), *given[COUNT:]),
        lambda g_out, g_final, *kept, **into: backward(
            g_out, g_final, ScanOperands(*kept[:COUNT]), *kept[COUNT:], **into
        ),
        shapes,
        into,
    )


def _float32(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes]
