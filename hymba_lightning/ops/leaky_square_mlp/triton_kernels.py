"""Triton kernels of an MLP's hidden layer: a product with the squared leaky ReLU, or its gradient, in the epilogue.

M tokens, K inner width, N hidden width. Tiles are read and written by the tensor memory accelerator, which leaves out
what lies outside a matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def write_activation(total, hidden, activation, row, column, SLOPE: tl.constexpr):
    """Stores a tile of W_in x and of its activation, computed from the rounded values as backward will."""
    rounded = total.to(hidden.dtype)
    hidden.store([row, column], rounded)
    x = rounded.to(tl.float32)
    lifted = tl.where(x > 0, x, x * SLOPE)
    activation.store([row, column], (lifted * lifted).to(activation.dtype))


@triton.jit
def write_gradient(total, hidden, activation, g_hidden, row, column, SLOPE: tl.constexpr):
    """Stores a tile of the gradient of W_in x, given the activation's, and the activation once more."""
    x = hidden.load([row, column]).to(tl.float32)
    gain = tl.where(x > 0, 1.0, SLOPE)
    lifted = x * gain
    g_hidden.store([row, column], (total * (2.0 * lifted * gain)).to(g_hidden.dtype))
    activation.store([row, column], (lifted * lifted).to(activation.dtype))


@triton.jit
def hidden_forward(x, w_in, hidden, activation, M, N, K, SLOPE: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr):
    """hidden = x w_inᵀ and its activation, (M, N). Grid (PROGRAMS,): a program takes every PROGRAMS-th tile."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, column = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(x.load([row, k]), w_in.load([column, k]).T, total)
        left, right = halves(total, BLOCK_M, BLOCK_N)
        write_activation(left, hidden, activation, row, column, SLOPE)
        write_activation(right, hidden, activation, row, column + BLOCK_N // 2, SLOPE)


@triton.jit
def hidden_backward(g, w_out, hidden, activation, g_hidden, M, N, K, SLOPE: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr):
    """g_hidden = (g w_out) · d activation / d hidden, and the activation. Grid (PROGRAMS,)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, column = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(g.load([row, k]), w_out.load([k, column]), total)
        left, right = halves(total, BLOCK_M, BLOCK_N)
        write_gradient(left, hidden, activation, g_hidden, row, column, SLOPE)
        write_gradient(right, hidden, activation, g_hidden, row, column + BLOCK_N // 2, SLOPE)
