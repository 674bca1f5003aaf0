"""The sum and its norm as one native loop for the CPU, compiled by numba; forward and hand-written backward.

A work item is a run of rows. N rows, D width, I items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.ops.lanes import LANES, f32, load, splat, store, total
from hymba_lightning.ops.native import flat, native_loop, rows, run_items
from hymba_lightning.ops.operators import Contract, make_operator

# Rows of a work item.
RUN = 256


@native_loop
def _forward(
    first,
    last,
    count,
    width,
    x,
    x_row,
    y,
    y_row,
    gain_x,
    gain_y,
    norms,
    eps,
    out,
    normed,
):
    """Work items first … last-1. out, and if it `norms` normed (N, D)."""
    for row in range(first * RUN, min(last * RUN, count)):
        squares = splat(f32(0))
        for c in range(0, width, LANES):
            value = load(gain_x, c) * load(x, row * x_row + c) + load(gain_y, c) * load(y, row * y_row + c)
            store(out, row * width + c, value)
            squares = squares + value * value
        if norms:
            scale = splat(f32(1 / np.sqrt(total(squares) / f32(width) + eps)))
            for c in range(row * width, (row + 1) * width, LANES):
                store(normed, c, load(out, c) * scale)


@native_loop
def _backward(
    first,
    last,
    count,
    width,
    x,
    x_row,
    y,
    y_row,
    gain_x,
    gain_y,
    norms,
    eps,
    out,
    g_out,
    g_out_row,
    g_normed,
    g_normed_row,
    g_x,
    g_y,
    g_gain_x,
    g_gain_y,
):
    """Work items first … last-1. g_x, g_y (N, D); g_gain_x, g_gain_y (I, D) are to be summed."""
    g = np.empty(width, f32)
    for item in range(first, last):
        for c in range(item * width, (item + 1) * width, LANES):
            store(g_gain_x, c, splat(f32(0)))
            store(g_gain_y, c, splat(f32(0)))
        for row in range(item * RUN, min(item * RUN + RUN, count)):
            for c in range(0, width, LANES):
                store(g, c, load(g_out, row * g_out_row + c))
            if norms:
                squares, along = splat(f32(0)), splat(f32(0))
                for c in range(0, width, LANES):
                    value = load(out, row * width + c)
                    squares = squares + value * value
                    along = along + value * load(g_normed, row * g_normed_row + c)
                scale = f32(1 / np.sqrt(total(squares) / f32(width) + eps))
                back = splat(f32(total(along) / f32(width) * scale * scale * scale))
                for c in range(0, width, LANES):
                    value = splat(scale) * load(g_normed, row * g_normed_row + c) - back * load(out, row * width + c)
                    store(g, c, load(g, c) + value)
            for c in range(0, width, LANES):
                value, at = load(g, c), item * width + c
                store(g_x, row * width + c, load(gain_x, c) * value)
                store(g_y, row * width + c, load(gain_y, c) * value)
                store(g_gain_x, at, load(g_gain_x, at) + value * load(x, row * x_row + c))
                store(g_gain_y, at, load(g_gain_y, at) + value * load(y, row * y_row + c))


def _operands(x: Tensor, y: Tensor, gain_x: Tensor | None, gain_y: Tensor, norms: bool, eps: float) -> tuple:
    """The arguments that both kernels begin with, after the work items."""
    width = x.size(-1)
    gain_x = torch.ones(width) if gain_x is None else gain_x
    matrices = (tensor.reshape(1, -1, width) for tensor in (x, y))
    x_N, y_N = (rows(matrix) for matrix in matrices)
    return x.numel() // width, width, *x_N, *y_N, flat(gain_x), flat(gain_y), norms, f32(eps)


def _items(x: Tensor) -> int:
    return -(-x.numel() // x.size(-1) // RUN)


def _forward_numba(
    x: Tensor, y: Tensor, gain_x: Tensor | None, gain_y: Tensor, norms: bool, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=torch.float32)
    normed = torch.empty(x.shape if norms else (0,), dtype=torch.float32)
    arguments = (*_operands(x, y, gain_x, gain_y, norms, eps), flat(out), flat(normed))
    run_items(_forward, "scaled sum", _items(x), float(x.numel()), arguments)
    return out, normed


def _backward_numba(
    g_out: Tensor,
    g_normed: Tensor,
    x: Tensor,
    y: Tensor,
    gain_x: Tensor | None,
    gain_y: Tensor,
    out: Tensor,
    norms: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    width, items = x.size(-1), _items(x)
    g_x, g_y = (torch.empty(x.shape, dtype=torch.float32) for _ in range(2))
    g_gains = [torch.empty((items, width), dtype=torch.float32) for _ in range(2)]
    arguments = (
        *_operands(x, y, gain_x, gain_y, norms, eps),
        flat(out),
        *rows(g_out.reshape(1, -1, width)),
        *(rows(g_normed.reshape(1, -1, width)) if norms else (flat(g_out[:0]), 0)),
        *map(flat, (g_x, g_y, *g_gains)),
    )
    run_items(_backward, "scaled sum's gradient", items, 3.0 * x.numel(), arguments)
    g_gain_x, g_gain_y = (g.sum(0) for g in g_gains)
    return g_x, g_y, g_x.new_empty(0) if gain_x is None else g_gain_x, g_gain_y


def _shapes(x, y, gain_x, gain_y, norms, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape if norms else (0,))


_scaled_sum = make_operator(
    "scaled_sum_numba",
    Contract(
        operands="Tensor x, Tensor y, Tensor? gain_x, Tensor gain_y, bool norms, float eps",
        results="out normed",
        n_differentiable=2,
        kept="x y gain_x gain_y out norms eps",
        gradients="x y gain_x gain_y",
    ),
    _forward_numba,
    _backward_numba,
    _shapes,
)


def scaled_sum_numba(
    x: Tensor, y: Tensor, gain_x_D: Tensor | None, gain_y_D: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """(..., D) twice."""
    out, normed = _scaled_sum(x, y, gain_x_D, gain_y_D, eps is not None, eps or 0.0)
    return out, out if eps is None else normed
