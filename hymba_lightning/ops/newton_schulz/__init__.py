"""One Newton-Schulz step of a bank of matrices: one contract, several backends.

n matrices of R rows and C columns, R <= C for the least work.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry

registry.register_folder("newton_schulz", __name__)
available_backends = functools.partial(registry.available_backends, "newton_schulz")


def newton_schulz_step(x_nRC: Tensor, a: float, b: float, c: float, *, backend: str = "auto") -> Tensor:
    """a X + b (X Xᵀ) X + c (X Xᵀ)² X for every matrix X of the bank (n, R, C), in its dtype; without gradient.

    Raises ValueError for what is not a bank of matrices and for an unknown backend, BackendUnavailableError for a named
    backend that cannot serve the call.
    """
    if x_nRC.dim() != 3:
        raise ValueError(f"newton_schulz_step takes a bank (n, R, C), not {tuple(x_nRC.shape)}")
    half_precision = x_nRC.dtype in (torch.bfloat16, torch.float16)
    step = registry.implementation("newton_schulz", backend, x_nRC.device.type, half_precision=half_precision)
    return step(x_nRC, a, b, c)
