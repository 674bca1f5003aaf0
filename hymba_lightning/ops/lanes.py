"""Sixteen float32 side by side, as a value in numba code: loops written with them are vector code on every CPU.

LLVM maps the vectors to the widest registers there are (AVX-512, AVX2, NEON). Leaving this to its loop vectoriser costs
a factor of two: every inner loop over a handful of arrays first checks at run time that they do not overlap.
Kernels see flat float32 arrays and index them themselves. Numba's cache does not notice a change of this file: delete
the __pycache__ folders beside the kernels after one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
f32 = np.float32
LOG2E = f32(1.4426950408889634)

_INT = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_INT, LANES)
# Multiply-adds may be fused, divisions turned into reciprocals; sums keep their order, NaN and infinity their meaning.
_FLAGS = ("contract", "nsz", "arcp")


class LanesType(types.Type):
    """Numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="float32_lanes")


lanes_type = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: object, numba_type: LanesType) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())


@intrinsic
def load(typing_context, array, index):
    """array[index:index+16]."""

    def generate(context, builder, signature, arguments):
        loaded = builder.load(_pointer(context, builder, signature.args[0], *arguments))
        loaded.align = 4
        return loaded

    return lanes_type(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, value):
    """array[index:index+16] = value."""

    def generate(context, builder, signature, arguments):
        stored = builder.store(arguments[2], _pointer(context, builder, signature.args[0], *arguments[:2]))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), generate


@intrinsic
def splat(typing_context, x):
    """Sixteen times the float32 x."""

    def generate(context, builder, signature, arguments):
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(nothing, arguments[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, nothing, _ints(0))

    return lanes_type(types.float32), generate


@intrinsic
def total(typing_context, x):
    """The sum of the sixteen, in any order."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(reduce, [ir.Constant(ir.FloatType(), 0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(lanes_type), generate


@intrinsic
def largest(typing_context, x):
    """The largest of the sixteen."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return builder.call(reduce, arguments)

    return types.float32(lanes_type), generate


@intrinsic
def larger(typing_context, x, y):
    """The larger of each pair; y where x is NaN."""

    def generate(context, builder, signature, arguments):
        x, y = arguments
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return lanes_type(lanes_type, lanes_type), generate


def _define(operation: Callable, emit: Callable) -> None:
    """Makes `operation` (operator.add, say) work on two lanes values."""

    @intrinsic
    def apply(typing_context, x, y):
        def generate(context, builder, signature, arguments):
            return emit(builder, *arguments)

        return lanes_type(lanes_type, lanes_type), generate

    @overload(operation)
    def choose(x, y):
        if isinstance(x, LanesType) and isinstance(y, LanesType):
            return lambda x, y: apply(x, y)
        return None


_define(operator.add, lambda builder, x, y: builder.fadd(x, y, flags=_FLAGS))
_define(operator.sub, lambda builder, x, y: builder.fsub(x, y, flags=_FLAGS))
_define(operator.mul, lambda builder, x, y: builder.fmul(x, y, flags=_FLAGS))
_define(operator.truediv, lambda builder, x, y: builder.fdiv(x, y, flags=_FLAGS))


def _larger(builder, x, bound):
    # The comparison is true for NaN, which so stays NaN.
    return builder.select(builder.fcmp_unordered(">", x, bound), x, bound)


def _smaller(builder, x, bound):
    return builder.select(builder.fcmp_unordered("<", x, bound), x, bound)


# Minimax polynomial of 2**f on [-1/2, 1/2], lowest power first; its relative error is 2e-9, below float32's rounding.
_EXP2 = (1.0, 6.93147206e-1, 2.40226469e-1, 5.55032878e-2, 9.61848896e-3, 1.33999312e-3, 1.53458118e-4)


@intrinsic
def exp2(typing_context, x):
    """2**x, x held within [-126, 127]."""

    def generate(context, builder, signature, arguments):
        x = _smaller(builder, _larger(builder, arguments[0], _floats(-126.0)), _floats(127.0))
        # Adding 1.5 * 2**23 rounds x to a whole number and leaves that number in the sum's low bits.
        shifter = _floats(12582912.0)
        rounded = builder.fadd(x, shifter)
        f = builder.fsub(x, builder.fsub(rounded, shifter))
        p = _floats(_EXP2[-1])
        for coefficient in _EXP2[-2::-1]:
            p = builder.fadd(builder.fmul(p, f, flags=_FLAGS), _floats(coefficient), flags=_FLAGS)
        # The whole part goes straight into the exponent.
        exponent = builder.shl(builder.bitcast(rounded, _INTS), _ints(23))
        return builder.bitcast(builder.add(builder.bitcast(p, _INTS), exponent), _FLOATS)

    return lanes_type(lanes_type), generate


@intrinsic
def _magnitude(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.and_(builder.bitcast(arguments[0], _INTS), _ints(0x7FFFFFFF)), _FLOATS)

    return lanes_type(lanes_type), generate


@intrinsic
def _positive_part(typing_context, x):
    def generate(context, builder, signature, arguments):
        return _larger(builder, arguments[0], _floats(0.0))

    return lanes_type(lanes_type), generate


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return splat(f32(1)) / (splat(f32(1)) + exp2(splat(-LOG2E) * x))


@njit(inline="always")
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + 2 artanh(e / (2 + e)) with e = exp(-|x|): keeps its digits where it is tiny."""
    e = exp2(splat(-LOG2E) * _magnitude(x))
    s = e / (splat(f32(2)) + e)
    q = s * s
    # Minimax polynomial of 2 artanh(s) / s in q = s**2 on [0, 1/9], relative error 4e-9.
    p = splat(f32(0.28178335))
    p = p * q + splat(f32(0.27960603))
    p = p * q + splat(f32(0.4002491))
    p = p * q + splat(f32(0.66666315))
    p = p * q + splat(f32(2))
    return _positive_part(x) + s * p
