"""The selective scan as a loop over time: slow, and the definition of what every backend must compute.

B batch, T sequence, E channels (d_inner), N states per channel (d_state).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_naive(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    z_BTE: Tensor | None,
    dt_bias_E: Tensor,
    initial_state_BEN: Tensor,
    doc_position_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t·h_t + D u_t;  out_t = y_t silu(z_t), all in float32.

    Where doc_position is 0 a document starts, and h_{t-1} has no part in h_t.
    dt_t = softplus(dt_BTE + dt_bias). Equation 2 of Mamba (arXiv:2312.00752) with its simplified discretisation of B.
    Returns out (B, T, E) in u's dtype and the state after the last token (B, E, N) in float32.
    """
    u, dt, B, C = u_BTE.float(), F.softplus(dt_BTE.float() + dt_bias_E.float()), B_BTN.float(), C_BTN.float()
    A = A_EN.float()
    state_BEN = initial_state_BEN.float()
    outputs = []
    tokens = zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for t, (u_BE, dt_BE, B_BN, C_BN) in enumerate(tokens):
        decay_BEN = torch.exp(dt_BE[:, :, None] * A)
        if doc_position_BT is not None:
            decay_BEN = decay_BEN.masked_fill((doc_position_BT[:, t] == 0)[:, None, None], 0)
        state_BEN = decay_BEN * state_BEN + (dt_BE * u_BE)[:, :, None] * B_BN[:, None, :]
        outputs.append((state_BEN * C_BN[:, None, :]).sum(-1))
    y_BTE = torch.stack(outputs, dim=1) + u * D_E.float()
    if z_BTE is not None:
        y_BTE = y_BTE * F.silu(z_BTE.float())
    return y_BTE.to(u_BTE.dtype), state_BEN
