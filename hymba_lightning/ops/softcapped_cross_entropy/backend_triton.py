"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.softcapped_cross_entropy.triton_launches import softcapped_cross_entropy_triton

    return softcapped_cross_entropy_triton


BACKEND = triton_backend(_load)
