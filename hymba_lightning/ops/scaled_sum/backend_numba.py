"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import native_loops


def _load() -> Callable:
    from hymba_lightning.ops.scaled_sum.loops import scaled_sum_numba

    return scaled_sum_numba


BACKEND = native_loops(
    _load,
    refuses=(
        (
            lambda call: not call.loops,
            "it takes float32 of a width divisible by 16, over 16 rows, and a gain of y: use 'torch'",
        ),
    ),
)
