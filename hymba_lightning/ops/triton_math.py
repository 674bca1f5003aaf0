"""Elementwise pieces that the Triton kernels of several ops share, float32 in and out unless said otherwise."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A time step after which nothing of a state is left, whatever its rate: exp2 of its product with a rate is exactly 0.
# Finite, since 0 · ∞ would be no number.
FORGET = tl.constexpr(1e30)


@triton.jit
def load_float32(pointers, mask, MASKED: tl.constexpr):
    """What the pointers hold, as float32; zero where the mask is false. Without MASKED the mask is not looked at."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def store_rounded(pointers, values, mask, MASKED: tl.constexpr):
    """Stores the values in the type the pointers have, where the mask is true; everywhere without MASKED."""
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def load_words(pointer, COUNT: tl.constexpr):
    """COUNT neighbours, a scalar each, as a tuple."""
    words = ()
    for i in tl.static_range(COUNT):
        words += (tl.load(pointer + i),)
    return words


@triton.jit
def unpacked(words, TYPE: tl.constexpr):
    """The values of TYPE, of 16 or 32 bits, that lie in a tuple of int64 scalars, as a tuple of float32 scalars."""
    COUNT: tl.constexpr = len(words)
    values = ()
    for i in tl.static_range(2 * COUNT):
        pair = (words[i // 2] >> (32 * (i % 2))).to(tl.int32)
        if TYPE.primitive_bitwidth == 32:
            values += (pair.to(tl.float32, bitcast=True),)
        elif TYPE.is_bf16():
            values += ((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
        else:
            values += (pair.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),)
            values += ((pair >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),)
    return values


@triton.jit
def prefetch_rows(first, stride, last, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Has the rows 0 … last, of WIDTH elements, `stride` elements apart, fetched into the cache; waits for nothing.

    For NVIDIA GPUs. COUNT, more than `last`, and WIDTH are powers of two.
    """
    SECTOR: tl.constexpr = 256 // first.dtype.element_ty.primitive_bitwidth
    PIECES: tl.constexpr = (WIDTH + SECTOR - 1) // SECTOR
    piece = tl.arange(0, COUNT * PIECES)
    where = first + tl.minimum(piece // PIECES, last) * stride + piece % PIECES * SECTOR
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [where.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def inside_if(channel, E: tl.constexpr, condition):
    """The mask of the channels below E if the scalar condition holds, of none if not."""
    # Widening the condition itself to a vector makes the interpreter's masks integers, which its loads refuse.
    return channel < tl.where(condition, E, 0)


@triton.jit
def forget_if_first(doc_position, known, MASKED: tl.constexpr):
    """FORGET where a document starts, else 0: a scalar to add to the time that a decay is of."""
    if MASKED:
        return tl.where(tl.load(doc_position, mask=known, other=1) == 0, FORGET, 0.0)
    else:
        return tl.where(tl.load(doc_position) == 0, FORGET, 0.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), to 4e-7 of its value however small that is."""
    y = tl.exp2(-tl.abs(x) * LOG2E)
    # log1p(y) / y on [0, 1] as a polynomial fitted to equal relative error: cheaper than log, exact at zero.
    series = -0.008778818883001804
    series = series * y + 0.044986166059970856
    series = series * y - 0.10902225226163864
    series = series * y + 0.178471639752388
    series = series * y - 0.24536851048469543
    series = series * y + 0.33284062147140503
    series = series * y - 0.4999817907810211
    series = series * y + 1.0
    return tl.maximum(x, 0.0) + y * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). Squaring a reciprocal square root needs none of the range checks of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))
    return root * root
