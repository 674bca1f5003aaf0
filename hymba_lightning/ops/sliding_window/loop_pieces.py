"""Pieces of the native loops of window attention: what a query sees, packing, and softmax's two passes over a row."""

from __future__ import annotations

import numpy as np
from numba import njit

from hymba_lightning.ops.lanes import LANES, exp2, f32, larger, largest, load, splat, store, total
from hymba_lightning.ops.native import native_loop

# Ones and zeros in whole vectors: read at 16 - n, n ones and then zeros; at 48 - n, n zeros and then ones.
EDGES = np.repeat(np.array([1, 0, 0, 1], f32), LANES)


@native_loop
def oldest_key(b, t, length, keys, window, doc_position, packed):
    """The first key that query t sees."""
    position = keys - length + t
    oldest = max(0, position - window + 1)
    if packed:
        oldest = max(oldest, position - doc_position[b * length + t])
    return oldest


@native_loop
def pack_rows(out, out_at, x, row, at, first, count, padded_count, width, padded, factor):
    """out (padded_count, padded) = factor times rows first … first+count-1 of x, zeros around."""
    for i in range(padded_count):
        place, source = out_at + i * padded, (first + i) * row + at
        n = width if i < count else 0
        for k in range(n):
            out[place + k] = x[source + k] * factor
        for k in range(n, padded):
            out[place + k] = f32(0)


@native_loop
def pack_panels(out, x, row, at, first, count, padded_count, width, padded):
    """`pack_rows`, transposed in panels of LANES rows: out (padded_count/LANES, padded, LANES)."""
    for i in range(padded_count):
        place, source = i // LANES * padded * LANES + i % LANES, (first + i) * row + at
        n = width if i < count else 0
        for k in range(n):
            out[place + k * LANES] = x[source + k]
        for k in range(n, padded):
            out[place + k * LANES] = f32(0)


@njit(inline="always")
def _shows(edges, x, left, right):
    """Ones where a column x … x+LANES-1 is at least `left` and below `right`, else zeros."""
    return load(edges, min(max(48 - left + x, 32), 48)) * load(edges, min(max(16 - right + x, 0), 16))


@native_loop
def weigh(p, at, columns, left, right, edges, offset):
    """p[at + x] = 2^(p - offset) for left <= x < right, else 0; returns the sum."""
    sums, offsets = splat(f32(0)), splat(offset)
    start, stop = left // LANES * LANES, min((right + LANES - 1) // LANES * LANES, columns)
    for x in range(0, start, LANES):
        store(p, at + x, splat(f32(0)))
    for x in range(start, stop, LANES):
        value = exp2(load(p, at + x) - offsets)
        if x < left or x + LANES > right:
            value = value * _shows(edges, x, left, right)
        store(p, at + x, value)
        sums = sums + value
    for x in range(stop, columns, LANES):
        store(p, at + x, splat(f32(0)))
    return total(sums)


@native_loop
def largest_score(p, at, left, right):
    """The largest p[at + x] for left <= x < right."""
    found = f32(-np.inf)
    start, stop = (left + LANES - 1) // LANES * LANES, right // LANES * LANES
    for x in range(left, min(start, right)):
        found = max(found, p[at + x])
    if start < stop:
        most = load(p, at + start)
        for x in range(start + LANES, stop, LANES):
            most = larger(most, load(p, at + x))
        found = max(found, largest(most))
    for x in range(max(stop, left), right):
        found = max(found, p[at + x])
    return found
