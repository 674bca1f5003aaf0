"""Triton kernels of the cross-entropy of softcapped logits, forward and backward.

N tokens, V vocabulary. A program owns one token and walks over its logits, BLOCK of them at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hymba_lightning.ops.triton_math import LN2, LOG2E, load_float32, store_rounded


@triton.jit
def softcap(x, CAP: tl.constexpr):
    """cap·tanh(x/cap) and its derivative."""
    # The exponential of a negative number cannot overflow.
    y = tl.exp2(tl.abs(x) * (-2.0 / CAP * LOG2E))
    inverse = 1.0 / (1.0 + y)
    size = CAP * (1.0 - y) * inverse
    return tl.where(x < 0, -size, size), 4.0 * y * inverse * inverse


@triton.jit
def loss_forward(
    logits, targets, nats, log_sums, V: tl.constexpr, ROW: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """nats and log_sums (N,). Grid (N,). A target outside 0 … V-1 gives NaN."""
    token = tl.program_id(0)
    logits += token.to(tl.int64) * ROW
    target = tl.load(targets + token)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        capped, _ = softcap(load_float32(logits + column, column < V, V % BLOCK != 0), CAP)
        if V % BLOCK != 0:
            capped = tl.where(column < V, capped, float("-inf"))
        larger = tl.maximum(largest, tl.max(capped, 0))
        total = total * tl.exp2((largest - larger) * LOG2E) + tl.sum(tl.exp2((capped - larger) * LOG2E), 0)
        largest = larger
    log_sum = largest + tl.log2(total) * LN2
    # The line that holds it has just been read.
    x_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    capped_target, _ = softcap(x_target, CAP)
    tl.store(log_sums + token, log_sum)
    tl.store(nats + token, log_sum - capped_target)


@triton.jit
def loss_backward(
    g_nats,
    logits,
    targets,
    log_sums,
    g_logits,
    V: tl.constexpr,
    ROW: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_logits (N, V). Grid (N,)."""
    token = tl.program_id(0)
    logits += token.to(tl.int64) * ROW
    g_logits += token.to(tl.int64) * V
    target = tl.load(targets + token)
    log_sum = tl.load(log_sums + token)
    g = tl.load(g_nats + token)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        capped, slope = softcap(load_float32(logits + column, column < V, V % BLOCK != 0), CAP)
        probability = tl.exp2((capped - log_sum) * LOG2E)
        g_capped = g * tl.where(column == target, probability - 1.0, probability)
        store_rounded(g_logits + column, g_capped * slope, column < V, V % BLOCK != 0)
