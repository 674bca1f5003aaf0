"""The selective scan as one fused native loop for the CPU, compiled by numba; forward and hand-written backward.

A work item is one sequence and a block of neighbouring channels. Time is the outer loop, the block's states stay in the
first-level cache, sixteen channels are computed at once, and nothing of size T is kept but the operands and gradients.

B batch, T sequence, E channels, N states. Kernels see flat arrays: per token (b*T + t), per state (n*WIDTH + c).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.lanes import LANES, LOG2E, exp2, f32, load, sigmoid, softplus, splat, store, total
from hymba_lightning.ops.native import flat, native_loop, positions, rows, run_items
from hymba_lightning.ops.selective_scan.operator import ScanOperands, make_scan_op, n_chunks
from hymba_lightning.ops.threads import one_torch_thread

# Tokens between two saved states; those in between are recomputed in backward, into the second-level cache.
CHUNK = 64
# Channels of a work item.
WIDTH = 64


@native_loop
def _forward(
    first,
    last,
    batch,
    length,
    channels,
    states,
    u,
    u_row,
    dt,
    dt_row,
    A,
    B,
    B_row,
    C,
    C_row,
    D,
    z,
    z_row,
    gated,
    dt_bias,
    doc_position,
    packed,
    initial,
    out,
    final,
    starts,
):
    """Work items first … last-1. A (N, E); initial, final (B, N, E); starts (B, chunks, N, E); doc_position (B, T) is
    read if `packed`."""
    blocks = (channels + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    h, rate = np.empty(states * WIDTH, f32), np.empty(states * WIDTH, f32)
    for item in range(first, last):
        b, e = item // blocks, item % blocks * WIDTH
        width = min(WIDTH, channels - e)
        for n in range(states):
            for c in range(0, width, LANES):
                store(h, n * WIDTH + c, load(initial, (b * states + n) * channels + e + c))
                store(rate, n * WIDTH + c, load(A, n * channels + e + c) * splat(LOG2E))
        for t in range(length):
            token = b * length + t
            if t % CHUNK == 0:
                for n in range(states):
                    for c in range(0, width, LANES):
                        place = ((b * chunks + t // CHUNK) * states + n) * channels + e + c
                        store(starts, place, load(h, n * WIDTH + c))
            if packed and doc_position[token] == 0:
                for place in range(0, states * WIDTH, LANES):
                    store(h, place, splat(f32(0)))
            for c in range(0, width, LANES):
                u_t = load(u, token * u_row + e + c)
                step = softplus(load(dt, token * dt_row + e + c) + load(dt_bias, e + c))
                inflow = step * u_t
                y = load(D, e + c) * u_t
                for n in range(states):
                    state = exp2(step * load(rate, n * WIDTH + c)) * load(h, n * WIDTH + c)
                    state = state + inflow * splat(B[token * B_row + n])
                    store(h, n * WIDTH + c, state)
                    y = y + state * splat(C[token * C_row + n])
                if gated:
                    z_t = load(z, token * z_row + e + c)
                    y = y * (z_t * sigmoid(z_t))
                store(out, token * channels + e + c, y)
        for n in range(states):
            for c in range(0, width, LANES):
                store(final, (b * states + n) * channels + e + c, load(h, n * WIDTH + c))


@native_loop
def _backward(
    first,
    last,
    batch,
    length,
    channels,
    states,
    u,
    u_row,
    dt,
    dt_row,
    A,
    B,
    B_row,
    C,
    C_row,
    D,
    z,
    z_row,
    gated,
    dt_bias,
    doc_position,
    packed,
    g_out,
    g_out_row,
    g_final,
    starts,
    g_u,
    g_dt,
    g_A,
    g_B,
    g_C,
    g_D,
    g_z,
    g_bias,
    g_initial,
):
    """Work items first … last-1. g_A (B, N, E), g_D, g_bias (B, E), g_B, g_C (blocks, B, T, N) are to be summed."""
    blocks = (channels + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    block_size = states * WIDTH
    h, decay = np.empty((CHUNK + 1) * block_size, f32), np.empty(CHUNK * block_size, f32)
    steps, slopes, ys = np.empty(CHUNK * WIDTH, f32), np.empty(CHUNK * WIDTH, f32), np.empty(CHUNK * WIDTH, f32)
    rate, g_h, sum_A = np.empty(block_size, f32), np.empty(block_size, f32), np.empty(block_size, f32)
    sum_D, sum_bias = np.empty(WIDTH, f32), np.empty(WIDTH, f32)
    sum_B, sum_C = np.empty(states * LANES, f32), np.empty(states * LANES, f32)
    zero, one = splat(f32(0)), splat(f32(1))
    for item in range(first, last):
        b, block = item // blocks, item % blocks
        e = block * WIDTH
        width = min(WIDTH, channels - e)
        for c in range(0, width, LANES):
            store(g_D, b * channels + e + c, zero)
            store(g_bias, b * channels + e + c, zero)
            for n in range(states):
                place = (b * states + n) * channels + e + c
                store(g_A, place, zero)
                store(g_h, n * WIDTH + c, load(g_final, place))
                store(rate, n * WIDTH + c, load(A, n * channels + e + c) * splat(LOG2E))
        for chunk in range(chunks - 1, -1, -1):
            t0 = chunk * CHUNK
            tokens = min(CHUNK, length - t0)
            for c in range(0, width, LANES):
                store(sum_D, c, zero)
                store(sum_bias, c, zero)
                for n in range(states):
                    store(sum_A, n * WIDTH + c, zero)
                    store(h, n * WIDTH + c, load(starts, ((b * chunks + chunk) * states + n) * channels + e + c))
            # The states inside the chunk, once more from the saved one before it.
            for i in range(tokens):
                token = b * length + t0 + i
                starts_document = packed and doc_position[token] == 0
                for c in range(0, width, LANES):
                    u_t = load(u, token * u_row + e + c)
                    raw = load(dt, token * dt_row + e + c) + load(dt_bias, e + c)
                    step = softplus(raw)
                    inflow = step * u_t
                    y = load(D, e + c) * u_t
                    for n in range(states):
                        place = i * block_size + n * WIDTH + c
                        factor = zero
                        if not starts_document:
                            factor = exp2(step * load(rate, n * WIDTH + c))
                        state = factor * load(h, place) + inflow * splat(B[token * B_row + n])
                        store(decay, place, factor)
                        store(h, place + block_size, state)
                        y = y + state * splat(C[token * C_row + n])
                    store(steps, i * WIDTH + c, step)
                    store(slopes, i * WIDTH + c, sigmoid(raw))
                    store(ys, i * WIDTH + c, y)
            for i in range(tokens - 1, -1, -1):
                token = b * length + t0 + i
                for n in range(states):
                    store(sum_B, n * LANES, zero)
                    store(sum_C, n * LANES, zero)
                for c in range(0, width, LANES):
                    here = token * channels + e + c
                    g_y = load(g_out, token * g_out_row + e + c)
                    if gated:
                        z_t = load(z, token * z_row + e + c)
                        s = sigmoid(z_t)
                        silu = z_t * s
                        store(g_z, here, g_y * load(ys, i * WIDTH + c) * (s + silu * (one - s)))
                        g_y = g_y * silu
                    u_t, step = load(u, token * u_row + e + c), load(steps, i * WIDTH + c)
                    inflow = step * u_t
                    g_inflow, g_step = zero, zero
                    for n in range(states):
                        place, lane = i * block_size + n * WIDTH + c, n * LANES
                        g = load(g_h, n * WIDTH + c) + g_y * splat(C[token * C_row + n])
                        store(sum_C, lane, load(sum_C, lane) + g_y * load(h, place + block_size))
                        store(sum_B, lane, load(sum_B, lane) + g * inflow)
                        g_inflow = g_inflow + g * splat(B[token * B_row + n])
                        g = g * load(decay, place)
                        store(g_h, n * WIDTH + c, g)
                        g_exponent = g * load(h, place)
                        store(sum_A, n * WIDTH + c, load(sum_A, n * WIDTH + c) + g_exponent * step)
                        g_step = g_step + g_exponent * load(A, n * channels + e + c)
                    g_raw = (g_step + g_inflow * u_t) * load(slopes, i * WIDTH + c)
                    store(g_u, here, g_y * load(D, e + c) + g_inflow * step)
                    store(g_dt, here, g_raw)
                    store(sum_D, c, load(sum_D, c) + g_y * u_t)
                    store(sum_bias, c, load(sum_bias, c) + g_raw)
                for n in range(states):
                    share = ((block * batch + b) * length + t0 + i) * states + n
                    g_B[share] = total(load(sum_B, n * LANES))
                    g_C[share] = total(load(sum_C, n * LANES))
            # Sums over time are taken chunk by chunk, which keeps their rounding small at any length.
            for c in range(0, width, LANES):
                place = b * channels + e + c
                store(g_D, place, load(g_D, place) + load(sum_D, c))
                store(g_bias, place, load(g_bias, place) + load(sum_bias, c))
                for n in range(states):
                    place = (b * states + n) * channels + e + c
                    store(g_A, place, load(g_A, place) + load(sum_A, n * WIDTH + c))
        for n in range(states):
            for c in range(0, width, LANES):
                store(g_initial, (b * states + n) * channels + e + c, load(g_h, n * WIDTH + c))


def _padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _widened(x: Tensor) -> Tensor:
    """x with zero channels added so that whole vectors can be read."""
    missing = _padded(x.size(-1)) - x.size(-1)
    return F.pad(x, (0, missing)) if missing else x


def _operands(scan: ScanOperands, doc_position: Tensor | None) -> tuple:
    """The arguments that both kernels begin with, after the work items."""
    u, dt, A, B, C, D, z, dt_bias = scan
    batch, length, channels = u.shape
    # An absent gate is stood in for by u: one compiled kernel serves both, and does not read it.
    gate = u if z is None else z
    return (
        batch,
        length,
        _padded(channels),
        A.size(1),
        *rows(_widened(u)),
        *rows(_widened(dt)),
        flat(_widened(A.t())),
        *rows(B),
        *rows(C),
        flat(_widened(D)),
        *rows(_widened(gate)),
        z is not None,
        flat(_widened(dt_bias)),
        *positions(doc_position),
    )


def _items(u: Tensor) -> int:
    return u.size(0) * -(-u.size(2) // WIDTH)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _forward_numba(
    scan: ScanOperands, initial_state: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    u, states = scan.u, scan.A.size(1)
    (batch, length, channels), width = u.shape, _padded(u.size(2))
    out, final = _empty(batch, length, width), _empty(batch, states, width)
    starts = _empty(batch, n_chunks(length, CHUNK), states, width)
    with one_torch_thread() as threads:
        arguments = (
            *_operands(scan, doc_position),
            flat(_widened(initial_state.transpose(1, 2))),
            flat(out),
            flat(final),
            flat(starts),
        )
        run_items(_forward, "selective scan", _items(u), float(u.numel() * states), arguments, threads)
        return (
            out[..., :channels].contiguous().to(u.dtype),
            final[..., :channels].transpose(1, 2).contiguous(),
            starts[..., :channels].contiguous(),
        )


def _backward_numba(
    g_out: Tensor, g_final: Tensor, scan: ScanOperands, starts: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, ...]:
    u, dt, A, B, C, D, z, dt_bias = scan
    (batch, length, channels), states, width = u.shape, A.size(1), _padded(u.size(2))
    g_u, g_dt = _empty(batch, length, width), _empty(batch, length, width)
    g_z = _empty(0, 0, 0) if z is None else _empty(batch, length, width)
    g_A, g_initial = _empty(batch, states, width), _empty(batch, states, width)
    g_D, g_bias = _empty(batch, width), _empty(batch, width)
    blocks = -(-channels // WIDTH)
    g_B, g_C = _empty(blocks, batch, length, states), _empty(blocks, batch, length, states)
    outputs = (g_u, g_dt, g_A, g_B, g_C, g_D, g_z, g_bias, g_initial)

    def narrowed(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient[..., :channels].contiguous().to(like.dtype)

    with one_torch_thread() as threads:
        arguments = (
            *_operands(scan, doc_position),
            *rows(_widened(g_out)),
            flat(_widened(g_final.transpose(1, 2))),
            flat(_widened(starts)),
            *map(flat, outputs),
        )
        run_items(_backward, "selective scan's gradient", _items(u), float(3 * u.numel() * states), arguments, threads)
        return (
            narrowed(g_u, u),
            narrowed(g_dt, dt),
            narrowed(g_A.sum(0), A).t().contiguous(),
            g_B.sum(0).to(B.dtype),
            g_C.sum(0).to(C.dtype),
            narrowed(g_D.sum(0), D),
            u.new_empty(0) if z is None else narrowed(g_z, z),
            narrowed(g_bias.sum(0), dt_bias),
            g_initial[..., :channels].transpose(1, 2).contiguous(),
        )


selective_scan_numba = make_scan_op("selective_scan_numba", _forward_numba, _backward_numba, CHUNK)
