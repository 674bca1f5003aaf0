"""Sums of what many programs of a kernel have found, straight into the gradients' own shapes and dtypes, in Triton.

E channels, N columns of a matrix (E, N) of parameters. The order of a sum is always the same. To be called where the
tensors' GPU is the current one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hymba_lightning.ops.triton_launch import COMPILE_OPTIONS

# Parts that a turn adds, and sums of a program: tall for few sums of many parts, flat for many sums of few. The fastest
# of five each on an H200 at the training shapes: a third of the time of torch's sum and the copies after it.
TALL = (64, 16)
FLAT = (8, 512)


@triton.jit
def total_of(parts, place, COUNT, WIDTH, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ_i parts[i · WIDTH + place], float32 (BLOCK,)."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, COUNT, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < COUNT)[:, None] & (place < WIDTH)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * WIDTH + place[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def channel_sums(
    parts, matrix, first, second, COUNT, E, N, VECTORS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of parts (COUNT, N + VECTORS, E): the first N rows into the matrix (E, N), the others into the vectors (E,)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = total_of(parts, place, COUNT, (N + VECTORS) * E, ROWS, BLOCK)
    row, channel = place // E, place % E
    tl.store(matrix + channel * N + row, total.to(matrix.dtype.element_ty), mask=row < N)
    tl.store(first + channel, total.to(first.dtype.element_ty), mask=row == N)
    if VECTORS > 1:
        tl.store(second + channel, total.to(second.dtype.element_ty), mask=row == N + 1)


@triton.jit
def pair_sums(parts, first, second, COUNT, WIDTH, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of parts (COUNT, tokens, 2, N), WIDTH = 2 · tokens · N, into `first` and `second` (tokens, N)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = total_of(parts, place, COUNT, WIDTH, ROWS, BLOCK)
    row, column = place // N, place % N
    where = row // 2 * N + column
    tl.store(first + where, total.to(first.dtype.element_ty), mask=(place < WIDTH) & (row % 2 == 0))
    tl.store(second + where, total.to(second.dtype.element_ty), mask=(place < WIDTH) & (row % 2 == 1))


def sum_channels(parts: Tensor, matrix_EN: Tensor, *vectors_E: Tensor) -> None:
    """Adds parts (count, N + 1 or 2, E) up into contiguous tensors, each in its own dtype."""
    count, rows, channels = parts.shape
    some_rows, block = TALL
    channel_sums[(triton.cdiv(rows * channels, block),)](
        parts,
        matrix_EN,
        vectors_E[0],
        vectors_E[-1],
        count,
        channels,
        rows - len(vectors_E),
        VECTORS=len(vectors_E),
        ROWS=some_rows,
        BLOCK=block,
        **COMPILE_OPTIONS | {"num_warps": 4},
    )


def sum_pairs(parts: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds parts (count, ..., 2, N) up into two contiguous tensors (..., N), each in its own dtype."""
    width = parts[0].numel()
    some_rows, block = FLAT
    pair_sums[(triton.cdiv(width, block),)](
        parts,
        first,
        second,
        parts.size(0),
        width,
        parts.size(-1),
        ROWS=some_rows,
        BLOCK=block,
        **COMPILE_OPTIONS | {"num_warps": 4},
    )
