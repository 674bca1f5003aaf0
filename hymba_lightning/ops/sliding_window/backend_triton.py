"""The entry of the Triton kernels: see triton_launches.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend
from hymba_lightning.ops.sliding_window.naive import HIDDEN
from hymba_lightning.ops.triton_launch import hopper_missing

# Widths whose kernels keep what they work on in registers.
HEAD_DIMS = (64, 128)


def _load() -> Callable:
    from hymba_lightning.ops.sliding_window.triton_launches import sliding_window_attention_triton

    return sliding_window_attention_triton


BACKEND = triton_backend(
    _load,
    summary="Triton, Hopper GPUs",
    check=hopper_missing,
    refuses=(
        (lambda call: call.hidden, HIDDEN),
        (
            lambda call: not call.half_precision,
            "its products are of bfloat16 or float16 matrices; cast q, k and v, or use backend 'flex'",
        ),
        (
            lambda call: call.head_dim not in HEAD_DIMS,
            "its kernels are made for heads of width 64 and 128; use backend 'flex'",
        ),
    ),
    auto={"cuda": 50},
)
