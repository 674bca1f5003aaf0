"""Triton kernels of the heads' norm, gain and turn, forward and backward.

B batch, T sequence, H heads, K head_dim, N = B·T tokens. A program owns ROWS tokens and goes through their heads, the
tables' cosines and sines (T, K/2) in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, row, seen, COLUMN: tl.constexpr, HALF: tl.constexpr):
    """The two halves (ROWS, K/2) of the head that begins at COLUMN of the rows at `row`, float32."""
    place = row[:, None] + (COLUMN + tl.arange(0, HALF))[None, :]
    first = tl.load(x + place, mask=seen[:, None], other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(out, row, seen, first, second, COLUMN: tl.constexpr, HALF: tl.constexpr):
    """What `halves` loads, written."""
    place = row[:, None] + (COLUMN + tl.arange(0, HALF))[None, :]
    tl.store(out + place, first.to(out.dtype.element_ty), mask=seen[:, None])
    tl.store(out + place + HALF, second.to(out.dtype.element_ty), mask=seen[:, None])


@triton.jit
def rows_of(token, T, batch_stride, ROW: tl.constexpr):
    """Where the tokens (ROWS,) of all sequences begin in a tensor with these strides."""
    return (token // T).to(tl.int64) * batch_stride + (token % T).to(tl.int64) * ROW


@triton.jit(do_not_specialize=["N", "T"])
def norm_and_turn(
    x,
    gain,
    cos,
    sin,
    out,
    N,
    T,
    x_batch,
    eps,
    X_ROW: tl.constexpr,
    COS_ROW: tl.constexpr,
    SIN_ROW: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out (N, H, K). Grid (blocks of tokens,)."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = token < N
    column = tl.arange(0, HALF)[None, :]
    a = tl.load(cos + (token % T)[:, None] * COS_ROW + column, mask=seen[:, None], other=0.0)
    b = tl.load(sin + (token % T)[:, None] * SIN_ROW + column, mask=seen[:, None], other=0.0)
    row, to = rows_of(token, T, x_batch, X_ROW), token.to(tl.int64) * (2 * H * HALF)
    for head in tl.static_range(H):
        x1, x2 = halves(x, row, seen, 2 * HALF * head, HALF)
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
        if HAS_GAIN:
            scale *= tl.load(gain + head).to(tl.float32)
        x1, x2 = x1 * scale[:, None], x2 * scale[:, None]
        store_halves(out, to, seen, x1 * a + x2 * b, x2 * a - x1 * b, 2 * HALF * head, HALF)


@triton.jit(do_not_specialize=["N", "T", "tiles_per_program"])
def norm_and_turn_backward(
    g_out,
    x,
    gain,
    cos,
    sin,
    g_x,
    g_gain,
    N,
    T,
    tiles_per_program,
    g_batch,
    x_batch,
    to_batch,
    eps,
    G_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    TO_ROW: tl.constexpr,
    COS_ROW: tl.constexpr,
    SIN_ROW: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """g_x (B, T, H, K); g_gain (programs, H), to be summed. Grid (spans of tiles_per_program blocks of tokens,)."""
    token = tl.program_id(0) * tiles_per_program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)[None, :]
    sums = ()
    for _ in tl.static_range(H):
        sums += (tl.zeros([ROWS], tl.float32),)
    for _ in range(tiles_per_program):
        seen = token < N
        a = tl.load(cos + (token % T)[:, None] * COS_ROW + column, mask=seen[:, None], other=0.0)
        b = tl.load(sin + (token % T)[:, None] * SIN_ROW + column, mask=seen[:, None], other=0.0)
        row, g_row = rows_of(token, T, x_batch, X_ROW), rows_of(token, T, g_batch, G_ROW)
        to = rows_of(token, T, to_batch, TO_ROW)
        added = ()
        for head in tl.static_range(H):
            x1, x2 = halves(x, row, seen, 2 * HALF * head, HALF)
            g1, g2 = halves(g_out, g_row, seen, 2 * HALF * head, HALF)
            g1, g2 = g1 * a - g2 * b, g2 * a + g1 * b
            scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
            along = tl.sum(x1 * g1 + x2 * g2, axis=1) * scale
            added += (sums[head] + along,)
            factor = scale
            if HAS_GAIN:
                factor = scale * tl.load(gain + head).to(tl.float32)
            back = (factor * along * scale / (2 * HALF))[:, None]
            factor = factor[:, None]
            store_halves(g_x, to, seen, factor * g1 - back * x1, factor * g2 - back * x2, 2 * HALF * head, HALF)
        sums = added
        token += ROWS
    if HAS_GAIN:
        for head in tl.static_range(H):
            tl.store(g_gain + tl.program_id(0) * H + head, tl.sum(sums[head], axis=0))
