"""The selective state-space scan of Mamba: one contract, several backends.

B batch, T sequence, E channels (d_inner), N states per channel (d_state).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.documents import check_doc_position
from hymba_lightning.ops.selective_scan.naive import selective_scan_naive
from hymba_lightning.ops.selective_scan.operator import ScanOperands

registry.register_folder("selective_scan", __name__, selective_scan_naive)
available_backends = functools.partial(registry.available_backends, "selective_scan")


def selective_scan(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    z_BTE: Tensor | None,
    *,
    dt_bias_E: Tensor,
    initial_state_BEN: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  out_t = (C_t·h_t + D u_t) silu(z_t).

    dt = softplus(dt_BTE + dt_bias); A is negative; without z there is no gate. State and arithmetic are float32; u, dt,
    B, C and z may be bfloat16, and `out` has u's dtype. With `return_state` also returns the state after the last token
    (B, E, N), in float32. Differentiable in every input, also through the returned state.

    `doc_position_BT`, int32, is how many earlier tokens of its own document each token has: where it is 0 a document
    starts, and the state before it is forgotten (a decay of 0). Without it a sequence is one document.

    Raises ValueError for shapes that do not fit and for an unknown backend, BackendUnavailableError for a named backend
    that cannot serve the call.
    """
    operands = ScanOperands(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, z_BTE, dt_bias_E)
    _check_shapes(operands, initial_state_BEN)
    check_doc_position("selective_scan", doc_position_BT, u_BTE)
    if backend == "auto" and registry.is_one_step(u_BTE):
        backend = "naive"
    scan = registry.implementation(
        "selective_scan",
        backend,
        u_BTE.device.type,
        initial_state=initial_state_BEN is not None,
        state_gradient=return_state and torch.is_grad_enabled(),
        documents=doc_position_BT is not None,
    )
    if initial_state_BEN is None:
        initial_state_BEN = A_EN.new_zeros(u_BTE.size(0), *A_EN.shape, dtype=torch.float32)
    # Some return more than this, which is for their backward.
    result = scan(*operands, initial_state_BEN, doc_position_BT)
    return (result[0], result[1]) if return_state else result[0]


def _check_shapes(operands: ScanOperands, initial_state: Tensor | None) -> None:
    u, dt, A, B, C, D, z, dt_bias = operands
    batch, length, channels = u.shape
    states = A.size(-1)
    wanted = [
        ("dt_BTE", dt, (batch, length, channels)),
        ("A_EN", A, (channels, states)),
        ("B_BTN", B, (batch, length, states)),
        ("C_BTN", C, (batch, length, states)),
        ("D_E", D, (channels,)),
        ("z_BTE", z, (batch, length, channels)),
        ("dt_bias_E", dt_bias, (channels,)),
        ("initial_state_BEN", initial_state, (batch, channels, states)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, u_BTE and A_EN ask for {shape}")
    if length == 0:
        raise ValueError("selective_scan: u_BTE has no tokens (T = 0)")
