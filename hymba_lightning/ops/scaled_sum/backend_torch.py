"""The sum by torch's own operators. D width; any leading dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend


def scaled_sum_torch(
    x: Tensor, y: Tensor, gain_x_D: Tensor | None, gain_y_D: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """(..., D) twice."""
    out = (x if gain_x_D is None else gain_x_D * x) + (y if gain_y_D is None else gain_y_D * y)
    return out, out if eps is None else F.rms_norm(out, out.shape[-1:], eps=eps)


BACKEND = Backend("plain PyTorch", lambda: scaled_sum_torch, plain=True, auto={"any": 10})
