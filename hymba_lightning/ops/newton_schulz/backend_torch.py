"""A Newton-Schulz step by torch's batched products. n matrices, R rows, C columns."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.ops.registry import Backend


def newton_schulz_step_torch(x_nRC: Tensor, a: float, b: float, c: float) -> Tensor:
    """a X + b (X Xᵀ) X + c (X Xᵀ)² X, its two square products rounded to the bank's dtype."""
    gram_nRR = x_nRC @ x_nRC.mT
    poly_nRR = torch.baddbmm(gram_nRR, gram_nRR, gram_nRR, beta=b, alpha=c)
    return torch.baddbmm(x_nRC, poly_nRR, x_nRC, beta=a)


BACKEND = Backend("batched products", lambda: newton_schulz_step_torch, auto={"any": 10})
