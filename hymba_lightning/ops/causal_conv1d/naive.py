"""The causal depthwise convolution written as its sum: the definition of what every backend must compute.

B batch, T sequence, E channels, W taps (d_conv).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_naive(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    silu: bool,
    initial_state_BEW1: Tensor,
    doc_position_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_j weight[:, W-1-j] x_{t-j}, then SiLU if asked, in float32. The sum goes over j = 0 … W-1, and
    with doc_position only over j <= doc_position: no further back than the document's start.

    The state holds the W-1 inputs before the first, oldest first. Returns y (B, T, E) and the last W-1 inputs
    (B, E, W-1), both in x's dtype.
    """
    length, taps = x_BTE.size(1), weight_EW.size(1)
    past_BWE = initial_state_BEW1.to(x_BTE.dtype).transpose(1, 2)
    padded = torch.cat([past_BWE, x_BTE], dim=1)
    y_BTE = bias_E.float().expand(x_BTE.shape)
    for tap in range(taps):
        input_BTE = padded[:, tap : tap + length].float()
        if doc_position_BT is not None:
            input_BTE = input_BTE.masked_fill((doc_position_BT < taps - 1 - tap)[..., None], 0)
        y_BTE = y_BTE + input_BTE * weight_EW[:, tap].float()
    if silu:
        y_BTE = F.silu(y_BTE)
    return y_BTE.to(x_BTE.dtype), padded[:, length:].transpose(1, 2).contiguous()
