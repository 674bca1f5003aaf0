"""The selective scan of the package mamba-ssm (CUDA), behind our contract: float32 dynamics, our layout, one operator.

Its kernel wants time last, so every operand and gradient is copied once in each direction. It starts from a zero state
and drops the gradient of the final one. B batch, T sequence, E channels, N states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba_lightning.ops.operators import Contract, FunctionContext, make_operator
from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.selective_scan.operator import COUNT, NAMES, OPERANDS, ScanOperands


def _time_last(scan: ScanOperands) -> tuple[Tensor | None, ...]:
    """The operands as the kernel wants them: (B, X, T), all of u's type; A, D and the bias float32."""
    u, dt, A, B, C, D, z, dt_bias = scan
    wide = (None if x is None else x.to(u.dtype).transpose(1, 2).contiguous() for x in (u, dt, B, C, z))
    u_BET, dt_BET, B_BNT, C_BNT, z_BET = wide
    return u_BET, dt_BET, A.float().contiguous(), B_BNT, C_BNT, D.float(), z_BET, dt_bias.float()


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn

    out_BET, state_BEN = SelectiveScanFn.forward(FunctionContext(), *_time_last(ScanOperands(*operands)), True, True)
    return out_BET.transpose(1, 2).contiguous(), state_BEN.to(torch.float32, copy=True)


def _backward(g_out: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn

    # What the kernel's forward leaves for its backward differs between versions, so the forward runs once more.
    context, scan = FunctionContext(), ScanOperands(*operands)
    SelectiveScanFn.forward(context, *_time_last(scan), True, False)
    gradients = SelectiveScanFn.backward(context, g_out.transpose(1, 2).contiguous())
    g_u, g_dt, g_A, g_B, g_C, g_D, g_z, g_bias = gradients[:8]

    def time_first(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.transpose(1, 2).to(like.dtype).contiguous()

    return (
        time_first(g_u, scan.u),
        time_first(g_dt, scan.dt),
        g_A.to(scan.A.dtype),
        time_first(g_B, scan.B),
        time_first(g_C, scan.C),
        g_D.to(scan.D.dtype),
        scan.u.new_empty(0) if scan.z is None else time_first(g_z, scan.z),
        g_bias.to(scan.dt_bias.dtype),
    )


def _shapes(u: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    state = torch.empty((u.size(0), *A.shape), dtype=torch.float32, device=u.device)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), state


selective_scan_mamba_ssm = make_operator(
    "selective_scan_mamba_ssm",
    Contract(OPERANDS, "out final", 1, NAMES, NAMES),
    _forward,
    _backward,
    _shapes,
)


def _from_zero(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scan without initial state, which is zeros, and documents: with others the call is refused."""
    return selective_scan_mamba_ssm(*operands[:COUNT])


def selective_scan_own_autograd(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    z_BTE: Tensor,
    dt_bias_E: Tensor,
) -> Tensor:
    """The package's scan as others call it, for comparisons of time: its autograd keeps what is recomputed
    here; copies to time-last and back included."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, B, C, z = (x.transpose(1, 2).contiguous() for x in (u_BTE, dt_BTE, B_BTN, C_BTN, z_BTE))
    return selective_scan_fn(u, dt, A_EN, B, C, D_E, z, dt_bias_E, delta_softplus=True).transpose(1, 2).contiguous()


REMEDY = "use backend 'triton' or 'chunked'"
BACKEND = Backend(
    "the package mamba-ssm",
    lambda: _from_zero,
    devices=("cuda",),
    # Newer releases of mamba-ssm come without this extension unless they are asked for it.
    package="selective_scan_cuda",
    install="MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation",
    refuses=(
        (lambda call: call.initial_state, f"mamba-ssm's kernel starts from a zero state; {REMEDY}"),
        (
            lambda call: call.state_gradient,
            f"mamba-ssm drops the final state's gradient; {REMEDY}, or torch.no_grad()",
        ),
        (lambda call: call.documents, f"mamba-ssm's kernel knows no documents within a sequence; {REMEDY}"),
    ),
    auto={"cuda": 20},
)
