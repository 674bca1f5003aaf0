"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.selective_scan.triton_launches import selective_scan_triton_op

    return selective_scan_triton_op


BACKEND = triton_backend(_load)
