"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import native_loops


def _load() -> Callable:
    from hymba_lightning.ops.rotary_norm.loops import rotary_norm_numba

    return rotary_norm_numba


BACKEND = native_loops(
    _load,
    refuses=(
        (
            lambda call: not call.loops,
            "it takes over 16 tokens, alike placed in all rows, of float32 heads of a width divisible by 32",
        ),
    ),
)
