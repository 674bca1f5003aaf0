"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend
from hymba_lightning.ops.triton_launch import hopper_missing

# Rows of the tensors that the tensor memory accelerator reads begin at multiples of 16 bytes.
WIDTH_STEP = 8


def _load() -> Callable:
    from hymba_lightning.ops.leaky_square_mlp.triton_launches import leaky_square_mlp_triton

    return leaky_square_mlp_triton


BACKEND = triton_backend(
    _load,
    summary="Triton, Hopper GPUs",
    check=hopper_missing,
    refuses=(
        (
            lambda call: not call.half_precision,
            "its products are of bfloat16 or float16 matrices; cast them, or use backend 'torch'",
        ),
        (
            lambda call: call.width % WIDTH_STEP != 0 or call.hidden % WIDTH_STEP != 0,
            f"its matrices' widths are multiples of {WIDTH_STEP}; use backend 'torch'",
        ),
    ),
)
