"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.causal_conv1d.triton_launches import causal_conv1d_triton_op

    return causal_conv1d_triton_op


BACKEND = triton_backend(_load)
