"""Triton kernel of a bank's products. n matrices; a program computes a block of one matrix's product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(pointers, row_in, column_in, MASKED: tl.constexpr):
    """What the pointers hold, zero outside the matrix."""
    if MASKED:
        return tl.load(pointers, mask=row_in & column_in, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def bank_product(
    left,
    right,
    added,
    out,
    ROWS,
    COLUMNS,
    INNER,
    right_k,
    right_column,
    alpha,
    beta,
    SYMMETRIC: tl.constexpr,
    ADDS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = alpha · left right + beta · added for n matrices, (ROWS, INNER) times (INNER, COLUMNS), sums in float32.

    Grid (blocks of rows · blocks of columns, n). `left`, `added` and `out` are contiguous, `right` has the strides
    right_k and right_column, and INNER · COLUMNS elements to a matrix. SYMMETRIC promises that the product is, and that
    `added` is: blocks above the diagonal are those below it, transposed. Without ADDS `added` is not read.
    """
    blocks = tl.cdiv(COLUMNS, BLOCK)
    block_row, block_column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if SYMMETRIC and block_column > block_row:
        return
    matrix = tl.program_id(1).to(tl.int64)
    left += matrix * ROWS * INNER
    right += matrix * INNER * COLUMNS
    out += matrix * ROWS * COLUMNS
    row, column = block_row * BLOCK + tl.arange(0, BLOCK), block_column * BLOCK + tl.arange(0, BLOCK)
    row_in, column_in = row < ROWS, column < COLUMNS
    k = tl.arange(0, BLOCK_K)
    left_pointers = left + row[:, None] * INNER + k[None, :]
    right_pointers = right + k[:, None] * right_k + column[None, :] * right_column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, INNER, BLOCK_K):
        k_in = k < INNER - first
        a = load_block(left_pointers, row_in[:, None], k_in[None, :], MASKED)
        b = load_block(right_pointers, k_in[:, None], column_in[None, :], MASKED)
        total = tl.dot(a, b, total)
        left_pointers += BLOCK_K
        right_pointers += BLOCK_K * right_k
    total *= alpha
    where = row[:, None] * COLUMNS + column[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if ADDS:
        added += matrix * ROWS * COLUMNS
        total += beta * load_block(added + where, row_in[:, None], column_in[None, :], MASKED).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + where, rounded, mask=inside)
    if SYMMETRIC and block_column < block_row:
        mirrored = column[:, None] * COLUMNS + row[None, :]
        tl.store(out + mirrored, tl.trans(rounded), mask=column_in[:, None] & row_in[None, :])
