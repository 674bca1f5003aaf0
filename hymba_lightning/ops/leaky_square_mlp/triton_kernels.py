"""Triton kernels of an MLP's hidden layer: a product with the squared leaky ReLU, or its gradient, in the epilogue.

The product itself is not kept: its absolute value follows from the activation, its sign is kept as one bit.
M tokens, K inner width, N hidden width. Tiles are read and written by the tensor memory accelerator, which leaves out
what lies outside a matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_signs(negative, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of truths as bits, (ROWS, 8): column c is bit c // 8 of entry c % 8, at most 32 bits.

    A thread of a product's result holds whole columns of that order, so that nothing moves between threads.
    """
    bits = negative.to(tl.int32).reshape(ROWS, COLUMNS // 8, 8) << tl.arange(0, COLUMNS // 8)[None, :, None]
    return tl.sum(bits, 1)


@triton.jit
def unpack_signs(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `pack_signs` packed, 0 or 1."""
    return ((packed[:, None, :] >> tl.arange(0, COLUMNS // 8)[None, :, None]) & 1).reshape(ROWS, COLUMNS)


@triton.jit
def signs_of(signs, row, tile_n, M, tiles_n, ROWS: tl.constexpr):
    """Pointers to the signs of a tile, (ROWS, 8), and which of them exist; `signs` is (M, tiles_n, 8)."""
    rows = row + tl.arange(0, ROWS)[:, None]
    return signs + (rows.to(tl.int64) * tiles_n + tile_n) * 8 + tl.arange(0, 8)[None, :], rows < M


@triton.jit
def hidden_forward(
    x,
    w_in,
    activation,
    signs,
    M,
    N,
    K,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """The activation of x w_inᵀ (M, N), and the signs of that. Grid (PROGRAMS,): each takes every PROGRAMS-th tile."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, tile_n = tile // tiles_n * BLOCK_M, tile % tiles_n
        column = tile_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(x.load([row, k]), w_in.load([column, k]).T, total)
        negative = total < 0
        lifted = tl.where(negative, total * SLOPE, total)
        activation.store([row, column], (lifted * lifted).to(activation.dtype))
        where, exists = signs_of(signs, row, tile_n, M, tiles_n, BLOCK_M)
        tl.store(where, pack_signs(negative, BLOCK_M, BLOCK_N), mask=exists)


@triton.jit
def hidden_backward(
    g,
    w_out,
    activation,
    signs,
    g_hidden,
    M,
    N,
    K,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """g_hidden = (g w_out) · d activation / d (x w_inᵀ), (M, N). Grid (PROGRAMS,)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, tile_n = tile // tiles_n * BLOCK_M, tile % tiles_n
        column = tile_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(g.load([row, k]), w_out.load([k, column]), total)
        size = tl.sqrt(activation.load([row, column]).to(tl.float32))
        where, exists = signs_of(signs, row, tile_n, M, tiles_n, BLOCK_M)
        negative = unpack_signs(tl.load(where, mask=exists, other=0), BLOCK_M, BLOCK_N)
        # The derivative of lifted², lifted being sign · size, is 2 · lifted · (1 or SLOPE).
        gain = tl.where(negative != 0, -2.0 * SLOPE, 2.0)
        g_hidden.store([row, column], (total * (size * gain)).to(g_hidden.dtype))
