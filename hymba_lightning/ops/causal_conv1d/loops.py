"""The causal depthwise convolution as one fused native loop for the CPU, compiled by numba.

A work item is one sequence and a run of tokens; sixteen channels are computed at once.
B batch, T sequence, E channels, W taps.
Kernels see flat arrays; `past` (B, W-1, E) holds the inputs before the first token, oldest first.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.causal_conv1d.operator import last_inputs, make_conv_op
from hymba_lightning.ops.lanes import LANES, f32, load, sigmoid, splat, store
from hymba_lightning.ops.native import flat, native_loop, positions, rows, run_items
from hymba_lightning.ops.threads import one_torch_thread

# Tokens of a work item, and channels that are taken through all of them before the next ones.
RUN = 128
WIDTH = 64


@native_loop
def _forward(
    first,
    last,
    batch,
    length,
    channels,
    taps,
    x,
    x_row,
    past,
    weight,
    bias,
    silu,
    doc_position,
    packed,
    y,
):
    """Work items first … last-1. weight (W, E); doc_position (B, T) is read if `packed`."""
    runs, kept = (length + RUN - 1) // RUN, taps - 1
    # The run's inputs and the W-1 before them, so that no tap has to ask where its input lies.
    inputs = np.empty((RUN + kept) * WIDTH, f32)
    for item in range(first, last):
        b, t0 = item // runs, item % runs * RUN
        tokens = min(RUN, length - t0)
        for c0 in range(0, channels, WIDTH):
            width = min(WIDTH, channels - c0)
            for i in range(tokens + kept):
                t = t0 + i - kept
                for c in range(0, width, LANES):
                    if t < 0:
                        store(inputs, i * WIDTH + c, load(past, (b * kept + t + kept) * channels + c0 + c))
                    else:
                        store(inputs, i * WIDTH + c, load(x, (b * length + t) * x_row + c0 + c))
            for i in range(tokens):
                oldest = max(0, kept - doc_position[b * length + t0 + i]) if packed else 0
                for c in range(0, width, LANES):
                    value = load(bias, c0 + c)
                    for tap in range(oldest, taps):
                        value = value + load(weight, tap * channels + c0 + c) * load(inputs, (i + tap) * WIDTH + c)
                    if silu:
                        value = value * sigmoid(value)
                    store(y, (b * length + t0 + i) * channels + c0 + c, value)


@native_loop
def _backward(
    first,
    last,
    batch,
    length,
    channels,
    taps,
    x,
    x_row,
    past,
    weight,
    bias,
    silu,
    doc_position,
    packed,
    g_y,
    g_y_row,
    g_x,
    g_past,
    g_weight,
    g_bias,
):
    """Work items first … last-1. g_weight (items, W, E) and g_bias (items, E) are to be summed; g_past (B, W-1, E)."""
    runs, kept = (length + RUN - 1) // RUN, taps - 1
    # W-1 tokens more on each side: the run's gradients come from the later ones, which see inputs of earlier ones.
    inputs = np.empty((RUN + 2 * kept) * WIDTH, f32)
    # The gradient before the activation, of the run and the W-1 tokens after it.
    g = np.empty((RUN + kept) * WIDTH, f32)
    zero, one = splat(f32(0)), splat(f32(1))
    for item in range(first, last):
        b, t0 = item // runs, item % runs * RUN
        tokens = min(RUN, length - t0)
        for c0 in range(0, channels, WIDTH):
            width = min(WIDTH, channels - c0)
            for i in range(tokens + 2 * kept):
                t = t0 + i - kept
                for c in range(0, width, LANES):
                    if t < 0:
                        store(inputs, i * WIDTH + c, load(past, (b * kept + t + kept) * channels + c0 + c))
                    elif t < length:
                        store(inputs, i * WIDTH + c, load(x, (b * length + t) * x_row + c0 + c))
            for i in range(tokens + kept):
                oldest = 0
                if packed and t0 + i < length:
                    oldest = max(0, kept - doc_position[b * length + t0 + i])
                for c in range(0, width, LANES):
                    value = zero
                    if t0 + i < length:
                        value = load(g_y, (b * length + t0 + i) * g_y_row + c0 + c)
                        if silu:
                            y = load(bias, c0 + c)
                            for tap in range(oldest, taps):
                                y = y + load(weight, tap * channels + c0 + c) * load(inputs, (i + tap) * WIDTH + c)
                            s = sigmoid(y)
                            value = value * (s + y * s * (one - s))
                    store(g, i * WIDTH + c, value)
            for c in range(0, width, LANES):
                total_bias = zero
                for i in range(tokens):
                    total_bias = total_bias + load(g, i * WIDTH + c)
                store(g_bias, item * channels + c0 + c, total_bias)
                for tap in range(taps):
                    total_tap = zero
                    for i in range(tokens):
                        if packed and doc_position[b * length + t0 + i] < kept - tap:
                            continue
                        total_tap = total_tap + load(g, i * WIDTH + c) * load(inputs, (i + tap) * WIDTH + c)
                    store(g_weight, (item * taps + tap) * channels + c0 + c, total_tap)
            # Input t reaches token t + j through tap W-1-j; the first run also owns the inputs before the sequence.
            for t in range(t0 - kept if t0 == 0 else t0, t0 + tokens):
                for c in range(0, width, LANES):
                    value = zero
                    for j in range(max(0, t0 - t), taps):
                        # The g of a token behind the last is zero.
                        if packed and t + j < length and doc_position[b * length + t + j] < j:
                            continue
                        value = value + load(weight, (kept - j) * channels + c0 + c) * load(g, (t - t0 + j) * WIDTH + c)
                    if t < 0:
                        store(g_past, (b * kept + t + kept) * channels + c0 + c, value)
                    else:
                        store(g_x, (b * length + t) * channels + c0 + c, value)


def _widened(x: Tensor) -> Tensor:
    """x with zero channels added so that whole vectors can be read."""
    missing = -x.size(-1) % LANES
    return F.pad(x, (0, missing)) if missing else x


def _operands(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor, doc_position: Tensor | None) -> tuple:
    """The arguments that both kernels begin with, after the work items."""
    wide = _widened(x)
    return (
        *wide.shape,
        weight.size(1),
        *rows(wide),
        flat(_widened(state.transpose(1, 2))),
        flat(_widened(weight.t())),
        flat(_widened(bias)),
        silu,
        *positions(doc_position),
    )


def _items(x: Tensor) -> int:
    return x.size(0) * -(-x.size(1) // RUN)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _forward_numba(
    x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with one_torch_thread() as threads:
        operands = _operands(x, weight, bias, silu, state, doc_position)
        y = _empty(*operands[:3])
        run_items(
            _forward, "causal convolution", _items(x), float(x.numel() * weight.size(1)), (*operands, flat(y)), threads
        )
        return y[..., : x.size(2)].contiguous().to(x.dtype), last_inputs(x, state)


def _backward_numba(
    g_y: Tensor,
    g_final: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    state: Tensor,
    doc_position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with one_torch_thread() as threads:
        operands = _operands(x, weight, bias, silu, state, doc_position)
        batch, length, width, taps = operands[:4]
        channels, items = x.size(2), _items(x)
        g_x, g_past = _empty(batch, length, width), _empty(batch, taps - 1, width)
        g_weight, g_bias = _empty(items, taps, width), _empty(items, width)
        arguments = (*operands, *rows(_widened(g_y)), flat(g_x), flat(g_past), flat(g_weight), flat(g_bias))
        run_items(_backward, "causal convolution's gradient", items, float(4 * x.numel() * taps), arguments, threads)
        g_x, g_past = g_x[..., :channels].contiguous(), g_past[..., :channels].contiguous()
        _add_to_last(g_past, g_x, g_final.float().transpose(1, 2))
        return (
            g_x.to(x.dtype),
            g_weight.sum(0)[:, :channels].t().to(weight.dtype).contiguous(),
            g_bias.sum(0)[:channels].to(bias.dtype),
            g_past.transpose(1, 2).to(state.dtype).contiguous(),
        )


def _add_to_last(g_past: Tensor, g_x: Tensor, g_final: Tensor) -> None:
    """Adds the final state's gradient (B, W-1, E) to that of the inputs it copies: the last W-1 of (past, x)."""
    kept, length = g_past.size(1), g_x.size(1)
    recent = min(kept, length)
    g_x[:, length - recent :] += g_final[:, kept - recent :]
    g_past[:, recent:] += g_final[:, : kept - recent]


causal_conv1d_numba = make_conv_op("causal_conv1d_numba", _forward_numba, _backward_numba)
