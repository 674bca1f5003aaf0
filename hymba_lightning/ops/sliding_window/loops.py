"""Window attention as one fused native loop for the CPU, compiled by numba; forward and hand-written backward.

A work item is one kv head of a sequence and a run of its queries. For a few queries at a time, those of all heads that
share the kv head, scores are computed of the keys that one of them sees, and stay in the first-level cache until
they are used (online softmax: arXiv:2205.14135). Backward makes them anew from the kept log-sums.

B batch, T queries, S keys, H query heads, G kv heads, R = H/G, K head_dim (in scratch memory widened to whole vectors).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.ops.lanes import LANES, LOG2E, f32, load, splat, store
from hymba_lightning.ops.native import flat, native_loop, positions, rows, run_items
from hymba_lightning.ops.sliding_window.loop_pieces import (
    EDGES,
    largest_score,
    oldest_key,
    pack_panels,
    pack_rows,
    weigh,
)
from hymba_lightning.ops.sliding_window.operator import WITH_LOG_SUMS_AND_DOCUMENTS, make_attention_op
from hymba_lightning.ops.tiles import ROWS, add_rows, set_rows

# Queries that are taken together, whole tiles of rows, and keys whose scores are kept at once.
QUERIES = 16
KEYS = 512
# Memory from one row of scores to the next: one cache line over a power of two, for what reads columns.
PITCH = KEYS + LANES
LN2 = f32(0.6931471805599453)


@native_loop
def _forward(
    first,
    last,
    batch,
    length,
    keys,
    heads,
    kv_heads,
    width,
    window,
    scale,
    parts,
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    doc_position,
    packed,
    edges,
    out,
    log_sums,
):
    """Work items first … last-1. out (B, T, H, K); log_sums (B, H, T), to base 2."""
    ratio, padded, offset, one = heads // kv_heads, (width + LANES - 1) // LANES * LANES, keys - length, f32(1)
    for item in range(first, last):
        b, g, part = item // parts // kv_heads, item // parts % kv_heads, item % parts
        t0, t1 = length * part // parts, length * (part + 1) // parts
        if t0 == t1:
            continue
        start = max(0, offset + t0 - window + 1)
        count = offset + t1 - start
        # Behind the last key there are zeros for whole vectors.
        padded_count = (count + LANES - 1) // LANES * LANES + LANES
        k_panels, v_rows = np.empty(padded_count * padded, f32), np.empty(padded_count * padded, f32)
        pack_panels(k_panels, k, k_row, g * width, b * keys + start, count, padded_count, width, padded)
        pack_rows(v_rows, 0, v, v_row, g * width, b * keys + start, count, padded_count, width, padded, one)
        n_rows = ratio * ROWS
        queries, sums = np.empty(n_rows * padded, f32), np.empty(n_rows * padded, f32)
        p = np.empty(n_rows * PITCH, f32)
        most, weight = np.empty(n_rows, f32), np.empty(n_rows, f32)
        for t in range(t0, t1, ROWS):
            tokens = min(ROWS, t1 - t)
            for r in range(ratio):
                at = (g * ratio + r) * width
                pack_rows(queries, r * ROWS * padded, q, q_row, at, b * length + t, tokens, ROWS, width, padded, scale)
            most[:], weight[:], sums[:] = f32(-np.inf), f32(0), f32(0)
            lowest = oldest_key(b, t, length, keys, window, doc_position, packed) - start
            highest = offset + t + tokens - start
            for low in range(lowest // LANES * LANES, highest, KEYS):
                columns = min(KEYS, (highest - low + LANES - 1) // LANES * LANES)
                for x in range(0, columns, 2 * LANES):
                    part_columns = min(2 * LANES, columns - x)
                    for r in range(ratio):
                        set_rows(
                            p,
                            r * ROWS * PITCH + x,
                            PITCH,
                            queries,
                            r * ROWS * padded,
                            padded,
                            1,
                            k_panels,
                            (low + x) * padded,
                            padded * LANES,
                            LANES,
                            padded,
                            part_columns,
                        )
                for i in range(tokens):
                    left = oldest_key(b, t + i, length, keys, window, doc_position, packed) - start - low
                    left, right = max(left, 0), min(offset + t + i + 1 - start - low, columns)
                    for r in range(ratio):
                        row = r * ROWS + i
                        found = largest_score(p, row * PITCH, left, right)
                        before = most[row]
                        if found > before:
                            most[row] = found
                        if most[row] == f32(-np.inf):
                            p[row * PITCH : row * PITCH + columns] = f32(0)
                            continue
                        here = weigh(p, row * PITCH, columns, left, right, edges, most[row])
                        if before != f32(-np.inf) and found > before:
                            kept = f32(2.0 ** (before - found))
                            weight[row] *= kept
                            for x in range(row * padded, (row + 1) * padded):
                                sums[x] *= kept
                        weight[row] += here
                for r in range(ratio):
                    add_rows(
                        sums,
                        r * ROWS * padded,
                        padded,
                        p,
                        r * ROWS * PITCH,
                        PITCH,
                        1,
                        v_rows,
                        low * padded,
                        LANES,
                        padded,
                        columns,
                        padded,
                    )
            for i in range(tokens):
                for r in range(ratio):
                    row, head = r * ROWS + i, g * ratio + r
                    log_sums[(b * heads + head) * length + t + i] = most[row] + np.log2(weight[row])
                    inverse = f32(1) / weight[row]
                    place = ((b * length + t + i) * heads + head) * width
                    for x in range(width):
                        out[place + x] = sums[row * padded + x] * inverse


@native_loop
def _backward(
    first,
    last,
    batch,
    length,
    keys,
    heads,
    kv_heads,
    width,
    window,
    scale,
    parts,
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    doc_position,
    packed,
    edges,
    g_out,
    g_out_row,
    out,
    out_row,
    log_sums,
    g_q,
    g_k,
    g_v,
):
    """Work items first … last-1. g_q (B, T, H, K); g_k, g_v (parts, B, S, G, K), zeros at first, are to be summed."""
    ratio, padded, offset, one = heads // kv_heads, (width + LANES - 1) // LANES * LANES, keys - length, f32(1)
    for item in range(first, last):
        b, g, part = item // parts // kv_heads, item // parts % kv_heads, item % parts
        t0, t1 = length * part // parts, length * (part + 1) // parts
        if t0 == t1:
            continue
        start = max(0, offset + t0 - window + 1)
        count = offset + t1 - start
        padded_count = (count + LANES - 1) // LANES * LANES + LANES
        size = padded_count * padded
        k_panels, v_panels, k_rows = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
        pack_panels(k_panels, k, k_row, g * width, b * keys + start, count, padded_count, width, padded)
        pack_panels(v_panels, v, v_row, g * width, b * keys + start, count, padded_count, width, padded)
        pack_rows(k_rows, 0, k, k_row, g * width, b * keys + start, count, padded_count, width, padded, one)
        sum_k, sum_v = np.zeros(size, f32), np.zeros(size, f32)
        n_rows = ratio * QUERIES
        queries, g_outs, g_queries = (
            np.empty(n_rows * padded, f32),
            np.empty(n_rows * padded, f32),
            np.empty(n_rows * padded, f32),
        )
        p, g_p = np.empty(n_rows * PITCH, f32), np.empty(n_rows * PITCH, f32)
        for t in range(t0, t1, QUERIES):
            tokens = min(QUERIES, t1 - t)
            for r in range(ratio):
                at, place = (g * ratio + r) * width, r * QUERIES * padded
                pack_rows(queries, place, q, q_row, at, b * length + t, tokens, QUERIES, width, padded, scale)
                pack_rows(g_outs, place, g_out, g_out_row, at, b * length + t, tokens, QUERIES, width, padded, one)
            g_queries[:] = f32(0)
            lowest = oldest_key(b, t, length, keys, window, doc_position, packed) - start
            highest = offset + t + tokens - start
            for low in range(lowest // LANES * LANES, highest, KEYS):
                columns = min(KEYS, (highest - low + LANES - 1) // LANES * LANES)
                for x in range(0, columns, 2 * LANES):
                    part_columns = min(2 * LANES, columns - x)
                    for row in range(0, n_rows, ROWS):
                        set_rows(
                            p,
                            row * PITCH + x,
                            PITCH,
                            queries,
                            row * padded,
                            padded,
                            1,
                            k_panels,
                            (low + x) * padded,
                            padded * LANES,
                            LANES,
                            padded,
                            part_columns,
                        )
                        set_rows(
                            g_p,
                            row * PITCH + x,
                            PITCH,
                            g_outs,
                            row * padded,
                            padded,
                            1,
                            v_panels,
                            (low + x) * padded,
                            padded * LANES,
                            LANES,
                            padded,
                            part_columns,
                        )
                for i in range(QUERIES):
                    left, right = 0, 0
                    if i < tokens:
                        left = oldest_key(b, t + i, length, keys, window, doc_position, packed) - start - low
                        left, right = max(left, 0), min(offset + t + i + 1 - start - low, columns)
                    for r in range(ratio):
                        row, head, along, kept = r * QUERIES + i, g * ratio + r, f32(0), f32(0)
                        if i < tokens:
                            place = (b * length + t + i) * out_row + head * width
                            for x in range(width):
                                along += g_outs[row * padded + x] * out[place + x]
                            kept = log_sums[(b * heads + head) * length + t + i]
                        weigh(p, row * PITCH, columns, left, right, edges, kept)
                        for x in range(row * PITCH, row * PITCH + columns, LANES):
                            store(g_p, x, load(p, x) * (load(g_p, x) - splat(along)))
                for row in range(0, n_rows, ROWS):
                    add_rows(
                        g_queries,
                        row * padded,
                        padded,
                        g_p,
                        row * PITCH,
                        PITCH,
                        1,
                        k_rows,
                        low * padded,
                        LANES,
                        padded,
                        columns,
                        padded,
                    )
                # Columns of p and g_p become rows: the sums run over the queries.
                for x in range(0, columns, ROWS):
                    place = (low + x) * padded
                    add_rows(sum_v, place, padded, p, x, 1, PITCH, g_outs, 0, LANES, padded, n_rows, padded)
                    add_rows(sum_k, place, padded, g_p, x, 1, PITCH, queries, 0, LANES, padded, n_rows, padded)
            factor = scale * LN2
            for i in range(tokens):
                for r in range(ratio):
                    place = ((b * length + t + i) * heads + g * ratio + r) * width
                    for x in range(width):
                        g_q[place + x] = g_queries[(r * QUERIES + i) * padded + x] * factor
        for i in range(count):
            place = (((part * batch + b) * keys + start + i) * kv_heads + g) * width
            for x in range(width):
                g_k[place + x] = sum_k[i * padded + x] * LN2
                g_v[place + x] = sum_v[i * padded + x]


def _operands(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, doc_position: Tensor | None) -> tuple:
    """The arguments that both kernels begin with, after the work items; scores are to base 2."""
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    # Two items for each thread, since one may be held up.
    threads = torch.get_num_threads()
    wanted = 2 * threads if threads > 1 else 1
    parts = max(1, min(-(-wanted // (batch * kv_heads)), length // QUERIES))
    return (
        *(batch, length, keys, heads, kv_heads, width, min(window, keys), f32(scale) * LOG2E, parts),
        *rows(q.flatten(2)),
        *rows(k.flatten(2)),
        *rows(v.flatten(2)),
        *positions(doc_position),
        EDGES,
    )


def _work(q: Tensor, window: int) -> float:
    return float(q.numel() * window)


def _forward_numba(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    operands = _operands(q, k, v, window, scale, doc_position)
    out = torch.empty(q.shape, dtype=torch.float32)
    log_sums = torch.empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    items = q.size(0) * k.size(2) * operands[8]
    run_items(_forward, "window attention", items, _work(q, window), (*operands, flat(out), flat(log_sums)))
    return out.to(q.dtype), log_sums


def _backward_numba(
    g_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    window: int,
    scale: float,
    doc_position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _operands(q, k, v, window, scale, doc_position)
    g_q = torch.empty(q.shape, dtype=torch.float32)
    g_k, g_v = (torch.zeros((operands[8], *k.shape), dtype=torch.float32) for _ in range(2))
    arguments = (
        *operands,
        *rows(g_out.flatten(2)),
        *rows(out.flatten(2)),
        flat(log_sums),
        *map(flat, (g_q, g_k, g_v)),
    )
    items = q.size(0) * k.size(2) * operands[8]
    run_items(_backward, "window attention's gradient", items, 3 * _work(q, window), arguments)
    g_k, g_v = ((g[0] if len(g) == 1 else g.sum(0)).to(k.dtype) for g in (g_k, g_v))
    return g_q.to(q.dtype), g_k, g_v


sliding_window_numba = make_attention_op(
    "sliding_window_numba", _forward_numba, _backward_numba, WITH_LOG_SUMS_AND_DOCUMENTS
)


def sliding_window_attention_numba(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k) v over the keys seen, float32 inside; the window None sees every earlier key."""
    window = k_BSGK.size(1) if window is None else window
    return sliding_window_numba(q_BTHK, k_BSGK, v_BSGK, window, scale, doc_position_BT)[0]
