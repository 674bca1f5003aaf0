"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import Backend


def _load() -> Callable:
    from hymba_lightning.ops.causal_conv1d.loops import causal_conv1d_numba

    return causal_conv1d_numba


BACKEND = Backend(
    "native CPU loops",
    _load,
    devices=("cpu",),
    package="numba",
    install="pip install numba",
    auto={"cpu": 20},
)
