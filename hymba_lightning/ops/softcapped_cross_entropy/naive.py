"""The cross-entropy of softcapped logits written as its formula: the definition of what every backend must compute.

N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softcapped_cross_entropy_naive(logits_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """log Σ_v exp(y_v) - y_target (N,) of y = cap·tanh(x/cap), in nats, float32 throughout."""
    capped_NV = cap * torch.tanh(logits_NV.float() / cap)
    return torch.logsumexp(capped_NV, dim=1) - capped_NV.gather(1, targets_N[:, None]).squeeze(1)
