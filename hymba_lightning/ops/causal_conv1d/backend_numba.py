"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import native_loops


def _load() -> Callable:
    from hymba_lightning.ops.causal_conv1d.loops import causal_conv1d_numba

    return causal_conv1d_numba


BACKEND = native_loops(_load)
