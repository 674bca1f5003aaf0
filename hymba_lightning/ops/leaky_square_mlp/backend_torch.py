"""The MLP by torch's own operators. D width, F hidden width; any leading dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend


def leaky_square_mlp_torch(x: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float) -> Tensor:
    """x (..., D) → (..., D)."""
    return F.linear(F.leaky_relu(F.linear(x, w_in_FD), slope).square(), w_out_DF)


BACKEND = Backend("plain PyTorch", lambda: leaky_square_mlp_torch, plain=True, auto={"any": 10})
