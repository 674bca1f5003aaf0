"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.rotary_norm.triton_launches import rotary_norm_triton_op

    return rotary_norm_triton_op


BACKEND = triton_backend(
    _load,
    refuses=(
        (
            lambda call: not call.kernels,
            "it takes float32, bfloat16 or float16 heads, alike placed in all rows, whose width is a power of two from "
            "32 on",
        ),
    ),
)
