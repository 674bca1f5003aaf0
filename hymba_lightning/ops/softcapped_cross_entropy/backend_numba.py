"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import native_loops


def _load() -> Callable:
    from hymba_lightning.ops.softcapped_cross_entropy.loops import softcapped_cross_entropy_numba

    return softcapped_cross_entropy_numba


BACKEND = native_loops(
    _load,
    refuses=(
        (lambda call: call.half_precision or call.vocabulary % 16, "it takes float32 of a vocabulary divisible by 16"),
        (lambda call: call.cap > 40, "its sums of exponentials hold for caps of at most 40"),
    ),
)
