"""The entry of the Triton kernels: see triton_launches.py.

Half the arithmetic; and cuBLAS' batched products on a Hopper run in clusters of programs, which died of an illegal
instruction where several processes shared a GPU (CUDA 13.0).
"""

from collections.abc import Callable

from hymba_lightning.ops.registry import triton_backend


def _load() -> Callable:
    from hymba_lightning.ops.newton_schulz.triton_launches import newton_schulz_step_triton

    return newton_schulz_step_triton


BACKEND = triton_backend(
    _load,
    refuses=(
        (
            lambda call: not call.half_precision,
            "its products are of bfloat16 or float16 matrices; cast them, or use backend 'torch'",
        ),
    ),
)
