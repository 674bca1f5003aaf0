"""Triton kernels of the heads' norm, gain and turn, forward and backward.

B batch, T sequence, H heads, K head_dim. A row is one head of one token, so that a program's loads are all under way
at once. Programs of the B sequences at the same positions are neighbours: the tables' cosines and sines (T, K/2) then
come from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, place, seen, HALF: tl.constexpr):
    """The two halves (ROWS, K/2), float32, of the heads that begin at `place` (ROWS,)."""
    where = place[:, None] + tl.arange(0, HALF)[None, :]
    first = tl.load(x + where, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(x + where + HALF, mask=seen, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(out, place, seen, first, second, HALF: tl.constexpr):
    """What `halves` loads, written."""
    where = place[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(out + where, first.to(out.dtype.element_ty), mask=seen)
    tl.store(out + where + HALF, second.to(out.dtype.element_ty), mask=seen)


@triton.jit
def turns(cos, sin, position, seen, COS_ROW: tl.constexpr, SIN_ROW: tl.constexpr, HALF: tl.constexpr):
    """The cosines and sines (ROWS, K/2) of the positions (ROWS,)."""
    column = tl.arange(0, HALF)[None, :]
    a = tl.load(cos + position[:, None] * COS_ROW + column, mask=seen, other=0.0)
    b = tl.load(sin + position[:, None] * SIN_ROW + column, mask=seen, other=0.0)
    return a, b


@triton.jit(do_not_specialize=["B", "T"])
def norm_and_turn(
    x,
    gain,
    cos,
    sin,
    out,
    B,
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
    """out (B, T, H, K). Grid (blocks of rows · B,)."""
    batch = (tl.program_id(0) % B).to(tl.int64)
    row = tl.program_id(0) // B * ROWS + tl.arange(0, ROWS)
    position, head = (row // H).to(tl.int64), row % H
    seen = (position < T)[:, None]
    x1, x2 = halves(x, batch * x_batch + position * X_ROW + head * (2 * HALF), seen, HALF)
    a, b = turns(cos, sin, position, seen, COS_ROW, SIN_ROW, HALF)
    scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
    if HAS_GAIN:
        scale *= tl.load(gain + head).to(tl.float32)
    x1, x2 = x1 * scale[:, None], x2 * scale[:, None]
    store_halves(out, (batch * T * H + row) * (2 * HALF), seen, x1 * a + x2 * b, x2 * a - x1 * b, HALF)


@triton.jit(do_not_specialize=["B", "T", "step"])
def norm_and_turn_backward(
    g_out,
    x,
    gain,
    cos,
    sin,
    g_x,
    g_gain,
    B,
    T,
    step,
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
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """g_x (B, T, H, K); g_gain (programs, H), to be summed. Grid (programs,), a multiple of B; a program's blocks of
    rows lie `step` rows apart. HEADS: H or more, and a divisor of ROWS, so that a row is the same head's in all blocks.
    """
    batch = (tl.program_id(0) % B).to(tl.int64)
    g_out, x, g_x = g_out + batch * g_batch, x + batch * x_batch, g_x + batch * to_batch
    row = tl.arange(0, ROWS)
    head = row % HEADS
    column = head * (2 * HALF)
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(tl.program_id(0) // B * ROWS, T * HEADS, step):
        position = ((first + row) // HEADS).to(tl.int64)
        seen = ((position < T) & (head < H))[:, None]
        x1, x2 = halves(x, position * X_ROW + column, seen, HALF)
        g1, g2 = halves(g_out, position * G_ROW + column, seen, HALF)
        a, b = turns(cos, sin, position, seen, COS_ROW, SIN_ROW, HALF)
        g1, g2 = g1 * a - g2 * b, g2 * a + g1 * b
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
        along = tl.sum(x1 * g1 + x2 * g2, axis=1) * scale
        sums += along
        factor = scale
        if HAS_GAIN:
            factor = scale * tl.load(gain + head, mask=head < H, other=0.0).to(tl.float32)
        back = (factor * along * scale / (2 * HALF))[:, None]
        factor = factor[:, None]
        store_halves(g_x, position * TO_ROW + column, seen, factor * g1 - back * x1, factor * g2 - back * x2, HALF)
    if HAS_GAIN:
        heads = tl.arange(0, HEADS)
        total = tl.sum(tl.reshape(sums, (ROWS // HEADS, HEADS)), axis=0)
        tl.store(g_gain + tl.program_id(0) * H + heads, total, mask=heads < H)
