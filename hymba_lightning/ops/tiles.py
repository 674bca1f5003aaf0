"""Matrix products of small pieces inside numba code: a tile of the result stays in registers while its sum runs.

C tile rows × vectors of LANES columns. Kernels see flat float32 arrays and say where rows, columns and terms lie, so
that one function serves products with and without transposition. As with lanes.py, numba's cache does not notice a
change of this file.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hymba_lightning.ops.lanes import _FLAGS, _FLOATS, LANES

# As many sums as the registers hold beside what is multiplied: 32 of 16 floats with AVX-512, half as many of 8 or 4
# elsewhere.
_WIDE = binding.get_host_cpu_features().get("avx512f", False)
ROWS, VECTORS = (8, 2) if _WIDE else (4, 1)


def _make_tile(vectors: int, adds: bool) -> Callable:
    @intrinsic
    def tile(typing_context, c, c_at, c_row, a, a_at, a_row, a_term, b, b_at, b_vector, b_term, terms):
        def generate(context, builder, signature, arguments):
            c, c_at, c_row, a, a_at, a_row, a_term, b, b_at, b_vector, b_term, terms = arguments
            c, a, b = (
                context.make_array(signature.args[place])(context, builder, array).data
                for place, array in ((0, c), (3, a), (7, b))
            )

            def times(index: int, stride: ir.Value) -> ir.Value:
                return builder.mul(ir.Constant(stride.type, index), stride)

            def vector(data: ir.Value, place: ir.Value) -> ir.Value:
                return builder.bitcast(builder.gep(data, [place]), _FLOATS.as_pointer())

            places = [
                vector(c, builder.add(builder.add(c_at, times(row, c_row)), ir.Constant(c_at.type, LANES * column)))
                for row in range(ROWS)
                for column in range(vectors)
            ]
            sums = [cgutils.alloca_once(builder, _FLOATS) for _ in places]
            for place, total in zip(places, sums, strict=True):
                start = builder.load(place, align=4) if adds else ir.Constant(_FLOATS, [0.0] * LANES)
                builder.store(start, total)
            nothing, lanes = ir.Constant(_FLOATS, ir.Undefined), ir.VectorType(ir.IntType(32), LANES)
            with cgutils.for_range(builder, terms) as loop:
                left = builder.add(a_at, builder.mul(loop.index, a_term))
                right = builder.add(b_at, builder.mul(loop.index, b_term))
                columns = [
                    builder.load(vector(b, builder.add(right, times(column, b_vector))), align=4)
                    for column in range(vectors)
                ]
                for row in range(ROWS):
                    factor = builder.load(builder.gep(a, [builder.add(left, times(row, a_row))]))
                    first = builder.insert_element(nothing, factor, ir.Constant(ir.IntType(32), 0))
                    factors = builder.shuffle_vector(first, nothing, ir.Constant(lanes, [0] * LANES))
                    for column in range(vectors):
                        total = sums[row * vectors + column]
                        product = builder.fmul(factors, columns[column], flags=_FLAGS)
                        builder.store(builder.fadd(builder.load(total), product, flags=_FLAGS), total)
            for place, total in zip(places, sums, strict=True):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        integers = [types.intp] * 3
        return types.void(c, types.intp, types.intp, a, *integers, b, *integers, types.intp), generate

    return tile


_set_wide, _set_narrow = _make_tile(VECTORS, adds=False), _make_tile(1, adds=False)
_add_wide, _add_narrow = _make_tile(VECTORS, adds=True), _make_tile(1, adds=True)


@njit(inline="always")
def set_rows(c, c_at, c_row, a, a_at, a_row, a_term, b, b_at, b_vector, b_term, terms, columns):
    """c[c_at + i·c_row + x] = Σ_k a[a_at + i·a_row + k·a_term] · b[b_at + x/LANES·b_vector + x%LANES + k·b_term] for
    ROWS rows i and `columns` columns x, a multiple of LANES; k below `terms`."""
    x = 0
    while x + VECTORS * LANES <= columns:
        place = b_at + x // LANES * b_vector
        _set_wide(c, c_at + x, c_row, a, a_at, a_row, a_term, b, place, b_vector, b_term, terms)
        x += VECTORS * LANES
    while x < columns:
        place = b_at + x // LANES * b_vector
        _set_narrow(c, c_at + x, c_row, a, a_at, a_row, a_term, b, place, b_vector, b_term, terms)
        x += LANES


@njit(inline="always")
def add_rows(c, c_at, c_row, a, a_at, a_row, a_term, b, b_at, b_vector, b_term, terms, columns):
    """`set_rows`, added to what stands in c."""
    x = 0
    while x + VECTORS * LANES <= columns:
        place = b_at + x // LANES * b_vector
        _add_wide(c, c_at + x, c_row, a, a_at, a_row, a_term, b, place, b_vector, b_term, terms)
        x += VECTORS * LANES
    while x < columns:
        place = b_at + x // LANES * b_vector
        _add_narrow(c, c_at + x, c_row, a, a_at, a_row, a_term, b, place, b_vector, b_term, terms)
        x += LANES
