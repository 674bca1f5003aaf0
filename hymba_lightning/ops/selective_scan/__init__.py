"""The selective state-space scan of Mamba: one contract, several backends.

B batch, T sequence, E channels (d_inner), N states per channel (d_state).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.selective_scan.naive import selective_scan_naive

BACKENDS = ("naive",)

registry.register("selective_scan", registry.Operation(
    backends={"naive": registry.Backend(registry.anywhere)},
    order={"other": ("naive",)},
))

available_backends = functools.partial(registry.available_backends, "selective_scan")


def selective_scan(u_BTE: Tensor, dt_BTE: Tensor, A_EN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_E: Tensor,
                   z_BTE: Tensor | None, *, dt_bias_E: Tensor, initial_state_BEN: Tensor | None = None,
                   return_state: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  out_t = (C_t·h_t + D u_t) silu(z_t)."""
    features = () if initial_state_BEN is None else ("initial_state",)
    registry.choose("selective_scan", backend, u_BTE.device.type, features)
    if initial_state_BEN is None:
        initial_state_BEN = u_BTE.new_zeros(u_BTE.size(0), *A_EN.shape, dtype=torch.float32)
    out_BTE, state_BEN = selective_scan_naive(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, z_BTE, dt_bias_E,
                                              initial_state_BEN)
    return (out_BTE, state_BEN) if return_state else out_BTE
