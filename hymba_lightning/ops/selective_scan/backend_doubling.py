"""The selective scan by recursive doubling, in plain differentiable PyTorch: log₂ T passes over all states at once.

It keeps every state of every pass, so that it is for short sequences; but nothing in it is an operator of its own. What
only torch's own operators have goes through it: second derivatives (Hessian-vector products, curvature), torch.func's
`vmap` and `jvp` (gradients per sequence), forward-mode differentiation. Hillis and Steele, "Data parallel algorithms"
(1986), on h_t = a_t h_{t-1} + b_t.

B batch, T sequence, E channels (d_inner), N states per channel (d_state).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend


def selective_scan_doubling(
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
    """Output (B, T, E) in u's dtype and the state after the last token (B, E, N), float32 inside."""
    u, dt = u_BTE.float(), F.softplus(dt_BTE.float() + dt_bias_E.float())
    decay_BTEN = torch.exp(dt[..., None] * A_EN.float())
    if doc_position_BT is not None:
        decay_BTEN = decay_BTEN.masked_fill((doc_position_BT == 0)[..., None, None], 0)
    state_BTEN = (dt * u)[..., None] * B_BTN.float()[:, :, None]
    first_B1EN = state_BTEN[:, :1] + decay_BTEN[:, :1] * initial_state_BEN.float()[:, None]
    state_BTEN = torch.cat([first_B1EN, state_BTEN[:, 1:]], dim=1)
    reach = 1
    while reach < u.size(1):
        # A pair (decay, state) of so many tokens behind one of as many: the pair of twice as many.
        ahead, behind = decay_BTEN[:, reach:], slice(None, -reach)
        state_BTEN = torch.cat([state_BTEN[:, :reach], state_BTEN[:, reach:] + ahead * state_BTEN[:, behind]], dim=1)
        decay_BTEN = torch.cat([decay_BTEN[:, :reach], ahead * decay_BTEN[:, behind]], dim=1)
        reach *= 2
    y_BTE = (state_BTEN * C_BTN.float()[:, :, None]).sum(-1) + u * D_E.float()
    if z_BTE is not None:
        y_BTE = y_BTE * F.silu(z_BTE.float())
    return y_BTE.to(u_BTE.dtype), state_BTEN[:, -1]


BACKEND = Backend(
    "plain PyTorch, differentiable twice and under torch.func", lambda: selective_scan_doubling, plain=True
)
