"""One Newton-Schulz step of a bank of matrices: one contract, several backends.

n matrices of R rows and C columns, R <= C for the least work.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry

_operation = registry.Operation(
    backends={
        "torch": registry.Backend(registry.anywhere),
        "triton": registry.Backend(
            registry.needs_triton,
            {"float32": "its products are of bfloat16 or float16 matrices; cast them, or use backend 'torch'"},
        ),
    },
    # Half the arithmetic; and cuBLAS' batched products on a Hopper run in clusters of programs, which died of an
    # illegal instruction where several processes shared a GPU (CUDA 13.0).
    order={"cuda": ("triton", "torch"), "other": ("torch",)},
)
registry.register("newton_schulz", _operation)

BACKENDS = tuple(_operation.backends)
available_backends = functools.partial(registry.available_backends, "newton_schulz")


def newton_schulz_step(x_nRC: Tensor, a: float, b: float, c: float, *, backend: str = "auto") -> Tensor:
    """a X + b (X Xᵀ) X + c (X Xᵀ)² X for every matrix X of the bank (n, R, C), in its dtype; without gradient.

    Raises ValueError for what is not a bank of matrices and for an unknown backend, BackendUnavailableError for a named
    backend that cannot serve the call.
    """
    if x_nRC.dim() != 3:
        raise ValueError(f"newton_schulz_step takes a bank (n, R, C), not {tuple(x_nRC.shape)}")
    features = () if x_nRC.dtype in (torch.bfloat16, torch.float16) else ("float32",)
    if registry.choose("newton_schulz", backend, x_nRC.device.type, features) == "torch":
        from hymba_lightning.ops.newton_schulz.products import newton_schulz_step_torch

        return newton_schulz_step_torch(x_nRC, a, b, c)
    from hymba_lightning.ops.newton_schulz.triton import newton_schulz_step_triton

    return newton_schulz_step_triton(x_nRC, a, b, c)
