"""Triton kernels of Muon's passes. A program works on rows or on a block of one matrix.

The matrices lie anywhere: `table` (3, MATRICES) has the addresses of gradients, momenta and parameters, and a launch
takes consecutive ones of one shape, (ROWS, COLUMNS) as a parameter has them, from `entry` on. `squares` has a sum of
squares for each of their rows from `first_sum` on. The order of a sum is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(table, index, ALIGNED: tl.constexpr):
    """The float32 matrix whose address the table has there. ALIGNED promises 16 bytes."""
    found = tl.load(table + index).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def direction_of(gradient, momentum, mu, NESTEROV: tl.constexpr):
    """What is orthogonalised."""
    if NESTEROV:
        return tl.fma(momentum, mu, gradient)
    else:
        return momentum


@triton.jit(do_not_specialize=["MATRICES", "entry", "first_sum"])
def add_gradients(
    table,
    squares,
    MATRICES,
    entry,
    first_sum,
    ROWS,
    COLUMNS,
    mu,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m <- μ m + g, and each row's sum of squares of what is orthogonalised. Grid (blocks of rows, matrices)."""
    matrix = tl.program_id(1)
    gradients = address(table, entry + matrix, ALIGNED)
    momenta = address(table, MATRICES + entry + matrix, ALIGNED)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, COLUMNS, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        where = row[:, None] * COLUMNS + column[None, :]
        inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
        gradient = tl.load(gradients + where, mask=inside, other=0.0)
        momentum = tl.load(momenta + where, mask=inside, other=0.0) * mu + gradient
        tl.store(momenta + where, momentum, mask=inside)
        direction = direction_of(gradient, momentum, mu, NESTEROV)
        total += direction * direction
    tl.store(squares + first_sum + matrix * ROWS + row, tl.sum(total, axis=1), mask=row < ROWS)


@triton.jit(do_not_specialize=["MATRICES", "entry", "first_sum", "slot"])
def fill_bank(
    table,
    squares,
    bank,
    MATRICES,
    entry,
    first_sum,
    slot,
    ROWS,
    COLUMNS,
    mu,
    EPS,
    NESTEROV: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """What is orthogonalised, scaled, into the contiguous bank from matrix `slot` on, transposed if TURNED.

    Grid (blocks of rows · blocks of columns, matrices). NORMALIZED: rows get length 1 before the matrix gets norm 1.
    """
    matrix = tl.program_id(1)
    gradients = address(table, entry + matrix, ALIGNED)
    momenta = address(table, MATRICES + entry + matrix, ALIGNED)
    squares += first_sum + matrix * ROWS
    bank += (slot + matrix).to(tl.int64) * ROWS * COLUMNS
    total = tl.zeros((BLOCK_SUMS,), tl.float32)
    for first in range(0, ROWS, BLOCK_SUMS):
        place = first + tl.arange(0, BLOCK_SUMS)
        square = tl.load(squares + place, mask=place < ROWS, other=0.0)
        if NORMALIZED:
            length = tl.sqrt_rn(square)
            length = length / (length + EPS)
            square = length * length
        total += square
    scale = 1.0 / (tl.sqrt_rn(tl.sum(total, axis=0)) + EPS)
    blocks = tl.cdiv(COLUMNS, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    where = row[:, None] * COLUMNS + column[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    gradient = tl.load(gradients + where, mask=inside, other=0.0)
    momentum = tl.load(momenta + where, mask=inside, other=0.0)
    direction = direction_of(gradient, momentum, mu, NESTEROV)
    if NORMALIZED:
        length = tl.sqrt_rn(tl.load(squares + row, mask=row < ROWS, other=1.0))
        direction *= (1.0 / (length + EPS))[:, None]
    scaled = (direction * scale).to(bank.dtype.element_ty)
    if TURNED:
        turned_where = column[:, None] * ROWS + row[None, :]
        turned_inside = (column < COLUMNS)[:, None] & (row < ROWS)[None, :]
        tl.store(bank + turned_where, tl.trans(scaled), mask=turned_inside)
    else:
        tl.store(bank + where, scaled, mask=inside)


@triton.jit(do_not_specialize=["MATRICES", "entry", "slot", "share"])
def move_parameters(
    table,
    updates,
    MATRICES,
    entry,
    slot,
    share,
    SHARES_APART,
    ROWS,
    COLUMNS,
    kept,
    decay,
    rate,
    CAUTIOUS: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """p <- kept · p + rate · x; CAUTIOUS: p + decay · p where p and x have one sign, else p, instead of kept · p.

    Grid (blocks of rows · blocks of columns, matrices). Matrix i of the updates, transposed if TURNED, is number
    i % share of row i // share, and the rows are SHARES_APART elements apart.
    """
    matrix = tl.program_id(1)
    params = address(table, 2 * MATRICES + entry + matrix, ALIGNED)
    number = (slot + matrix).to(tl.int64)
    updates += number // share * SHARES_APART + number % share * ROWS * COLUMNS
    blocks = tl.cdiv(COLUMNS, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    where = row[:, None] * COLUMNS + column[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    weight = tl.load(params + where, mask=inside, other=0.0)
    if TURNED:
        turned_where = column[:, None] * ROWS + row[None, :]
        turned_inside = (column < COLUMNS)[:, None] & (row < ROWS)[None, :]
        x = tl.trans(tl.load(updates + turned_where, mask=turned_inside, other=0.0)).to(tl.float32)
    else:
        x = tl.load(updates + where, mask=inside, other=0.0).to(tl.float32)
    if CAUTIOUS:
        weight = tl.fma(tl.where(weight * x > 0, weight, 0.0), decay, weight)
    else:
        weight *= kept
    tl.store(params + where, tl.fma(x, rate, weight), mask=inside)
