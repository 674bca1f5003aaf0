"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import native_loops


def _load() -> Callable:
    from hymba_lightning.ops.selective_scan.loops import selective_scan_numba

    return selective_scan_numba


BACKEND = native_loops(_load)
