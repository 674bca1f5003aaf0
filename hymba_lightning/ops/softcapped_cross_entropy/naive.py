"""The cross-entropy of softcapped logits written as its formula: the definition of what every backend must compute.

N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softcapped_cross_entropy_naive(logits_NV: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """log Σ_v exp(y_v) - y_target of y = cap·tanh(x/cap), in nats, and its first term: (N,) both, float32."""
    capped_NV = cap * torch.tanh(logits_NV.float() / cap)
    log_sums_N = torch.logsumexp(capped_NV, dim=1)
    return log_sums_N - capped_NV.gather(1, targets_N[:, None]).squeeze(1), log_sums_N
