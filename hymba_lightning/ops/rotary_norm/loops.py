"""The norm and the turn as one native loop for the CPU, compiled by numba; forward and hand-written backward.

A work item is a run of tokens. B batch, T sequence, H heads, K head_dim, N = B·T tokens, I items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.ops.lanes import LANES, f32, load, splat, store, total
from hymba_lightning.ops.native import flat, native_loop, rows, run_items
from hymba_lightning.ops.rotary_norm.operator import make_rotary_op

# Tokens of a work item.
RUN = 256


@native_loop
def _forward(first, last, count, length, heads, width, x, x_row, gain, cos, sin, eps, out):
    """Work items first … last-1. cos, sin (T, K/2); out (N, H, K)."""
    half = width // 2
    for token in range(first * RUN, min(last * RUN, count)):
        turn = token % length * half
        for head in range(heads):
            source, place = token * x_row + head * width, (token * heads + head) * width
            squares = splat(f32(0))
            for c in range(source, source + width, LANES):
                squares = squares + load(x, c) * load(x, c)
            scale = splat(f32(gain[head] / np.sqrt(total(squares) / f32(width) + eps)))
            for c in range(0, half, LANES):
                x1, x2 = load(x, source + c) * scale, load(x, source + half + c) * scale
                a, b = load(cos, turn + c), load(sin, turn + c)
                store(out, place + c, x1 * a + x2 * b)
                store(out, place + half + c, x2 * a - x1 * b)


@native_loop
def _backward(
    first,
    last,
    count,
    length,
    heads,
    width,
    x,
    x_row,
    gain,
    cos,
    sin,
    eps,
    g_out,
    g_row,
    g_x,
    g_gain,
):
    """Work items first … last-1. g_x (N, H, K); g_gain (I, H), zeros at first, is to be summed."""
    half = width // 2
    g = np.empty(width, f32)
    for item in range(first, last):
        for token in range(item * RUN, min(item * RUN + RUN, count)):
            turn = token % length * half
            for head in range(heads):
                source, place = token * x_row + head * width, (token * heads + head) * width
                squares, sums = splat(f32(0)), splat(f32(0))
                for c in range(0, half, LANES):
                    g1, g2 = (
                        load(g_out, token * g_row + head * width + c),
                        load(g_out, token * g_row + head * width + half + c),
                    )
                    a, b = load(cos, turn + c), load(sin, turn + c)
                    x1, x2 = load(x, source + c), load(x, source + half + c)
                    g1, g2 = g1 * a - g2 * b, g2 * a + g1 * b
                    store(g, c, g1)
                    store(g, half + c, g2)
                    squares = squares + x1 * x1 + x2 * x2
                    sums = sums + x1 * g1 + x2 * g2
                scale = f32(1 / np.sqrt(total(squares) / f32(width) + eps))
                along = total(sums) * scale
                g_gain[item * heads + head] += along
                factor = scale * gain[head]
                back = splat(f32(factor * along * scale / f32(width)))
                for c in range(0, width, LANES):
                    store(g_x, place + c, splat(factor) * load(g, c) - back * load(x, source + c))


def _operands(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple:
    """The arguments that both kernels begin with, after the work items."""
    batch, length, heads, width = x.shape
    gain = torch.ones(heads) if gain is None else gain
    turns = flat(cos), flat(sin[:, :, 0])
    return batch * length, length, heads, width, *rows(x.flatten(2)), flat(gain), *turns, f32(eps)


def _items(x: Tensor) -> int:
    return -(-x.size(0) * x.size(1) // RUN)


def _forward_numba(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32)
    arguments = (*_operands(x, gain, cos, sin, eps), flat(out))
    run_items(_forward, "norm and turn", _items(x), float(x.numel()), arguments)
    return out


def _backward_numba(
    g_out: Tensor, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    g_x = torch.empty(x.shape, dtype=torch.float32)
    g_gain = torch.zeros((_items(x), x.size(2)), dtype=torch.float32)
    arguments = (*_operands(x, gain, cos, sin, eps), *rows(g_out.flatten(2)), flat(g_x), flat(g_gain))
    run_items(_backward, "norm's and turn's gradient", _items(x), 3.0 * x.numel(), arguments)
    return g_x, g_x.new_empty(0) if gain is None else g_gain.sum(0)


rotary_norm_numba = make_rotary_op("rotary_norm_numba", _forward_numba, _backward_numba)
