"""The state-space dual recurrence as a loop over time: slow, and the definition of what every backend must compute.

B batch, T sequence, H heads, P channels of a head, G groups of heads, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_naive(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    initial_state_BHPN: Tensor,
    doc_position_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ;  y_t = h_t C_t + D x_t, all in float32, B and C shared by the heads of
    a group.

    dt_t = softplus(dt_BTH + dt_bias). Where doc_position is 0 a document starts, and h_{t-1} has no part in h_t.
    Mamba-2 (arXiv:2405.21060), section 7. Returns y (B, T, H, P) in x's dtype and the state after the last token
    (B, H, P, N) in float32.
    """
    x, dt, A, D = x_BTHP.float(), F.softplus(dt_BTH.float() + dt_bias_H.float()), A_H.float(), D_H.float()
    heads_per_group = x.size(2) // B_BTGN.size(2)
    B, C = (operand.float().repeat_interleave(heads_per_group, dim=2) for operand in (B_BTGN, C_BTGN))
    state_BHPN = initial_state_BHPN.float()
    outputs = []
    tokens = zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for t, (x_BHP, dt_BH, B_BHN, C_BHN) in enumerate(tokens):
        decay_BH = torch.exp(dt_BH * A)
        if doc_position_BT is not None:
            decay_BH = decay_BH.masked_fill((doc_position_BT[:, t] == 0)[:, None], 0)
        inflow_BHPN = (dt_BH[..., None] * x_BHP)[..., None] * B_BHN[:, :, None]
        state_BHPN = decay_BH[..., None, None] * state_BHPN + inflow_BHPN
        outputs.append((state_BHPN * C_BHN[:, :, None]).sum(-1))
    y_BTHP = torch.stack(outputs, dim=1) + x * D[:, None]
    return y_BTHP.to(x_BTHP.dtype), state_BHPN
