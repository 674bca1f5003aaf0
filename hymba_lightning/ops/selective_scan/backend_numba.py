"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import Backend


def _load() -> Callable:
    from hymba_lightning.ops.selective_scan.loops import selective_scan_numba

    return selective_scan_numba


BACKEND = Backend(
    "native CPU loops",
    _load,
    devices=("cpu",),
    package="numba",
    install="pip install numba",
    auto={"cpu": 20},
)
