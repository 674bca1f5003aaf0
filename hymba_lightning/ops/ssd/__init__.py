"""The state-space dual recurrence of Mamba-2 (arXiv:2405.21060): one decay for each head, B and C for each group.

B batch, T sequence, H heads, P channels of a head, G groups of heads, N states.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.documents import check_doc_position
from hymba_lightning.ops.ssd.naive import ssd_naive

registry.register_folder("ssd", __name__, ssd_naive)
available_backends = functools.partial(registry.available_backends, "ssd")


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    *,
    dt_bias_H: Tensor,
    initial_state_BHPN: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ;  y_t = h_t C_t + D x_t.

    dt = softplus(dt_BTH + dt_bias); A is negative. Decays and state are float32; x, dt, B and C may be bfloat16, and y
    has x's dtype. With `return_state` also returns the state after the last token (B, H, P, N), in float32.
    Differentiable in every input, also through the returned state.

    `doc_position_BT`, int32, is how many earlier tokens of its own document each token has: where it is 0 a document
    starts, and the state before it is forgotten (a decay of 0). Without it a sequence is one document.

    Raises ValueError for shapes that do not fit and for an unknown backend, BackendUnavailableError for a named backend
    that cannot serve the call.
    """
    _check_shapes(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, dt_bias_H, initial_state_BHPN)
    check_doc_position("ssd", doc_position_BT, x_BTHP)
    if backend == "auto" and registry.is_one_step(x_BTHP):
        backend = "naive"
    compute = registry.implementation("ssd", backend, x_BTHP.device.type)
    if initial_state_BHPN is None:
        shape = x_BTHP.size(0), *x_BTHP.shape[2:], B_BTGN.size(-1)
        initial_state_BHPN = torch.zeros(shape, dtype=torch.float32, device=x_BTHP.device)
    operands = x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, dt_bias_H, initial_state_BHPN, doc_position_BT
    y_BTHP, state_BHPN = compute(*operands)
    return (y_BTHP, state_BHPN) if return_state else y_BTHP


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial_state: Tensor | None
) -> None:
    batch, length, heads, channels = x.shape
    groups, states = B.shape[-2:]
    wanted = [
        ("dt_BTH", dt, (batch, length, heads)),
        ("A_H", A, (heads,)),
        ("B_BTGN", B, (batch, length, groups, states)),
        ("C_BTGN", C, (batch, length, groups, states)),
        ("D_H", D, (heads,)),
        ("dt_bias_H", dt_bias, (heads,)),
        ("initial_state_BHPN", initial_state, (batch, heads, channels, states)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"ssd: {name} has shape {tuple(tensor.shape)}, x_BTHP and B_BTGN ask for {shape}")
    if heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot share B and C in {groups} groups: the groups must divide them")
    if length == 0:
        raise ValueError("ssd: x_BTHP has no tokens (T = 0)")
