"""The selective scan of the package mamba-ssm (CUDA), behind our contract: float32 dynamics, our layout, one operator.

Its kernel wants time last, so every operand and gradient is copied once in each direction. It starts from a zero state
and drops the gradient of the final one. B batch, T sequence, E channels, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.ops.packages import Context


def _time_last(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The operands as the kernel wants them: (B, X, T), all of u's type; A, D and the bias float32."""
    wide = (None if x is None else x.to(u.dtype).transpose(1, 2).contiguous() for x in (u, dt, B, C, z))
    u_BET, dt_BET, B_BNT, C_BNT, z_BET = wide
    return u_BET, dt_BET, A.float().contiguous(), B_BNT, C_BNT, D.float(), z_BET, dt_bias.float()


@torch.library.custom_op("hymba::selective_scan_mamba_ssm", mutates_args=())
def selective_scan_mamba_ssm(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan from a zero state: out (B, T, E) in u's dtype and the final state (B, E, N), which has no gradient."""
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn

    operands = _time_last(u, dt, A, B, C, D, z, dt_bias)
    out_BET, state_BEN = SelectiveScanFn.forward(Context(), *operands, True, True)
    return out_BET.transpose(1, 2).contiguous(), state_BEN.to(torch.float32, copy=True)


@selective_scan_mamba_ssm.register_fake
def _(u, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty((u.size(0), *A.shape), dtype=torch.float32, device=u.device),
    )


@torch.library.custom_op("hymba::selective_scan_mamba_ssm_backward", mutates_args=())
def _backward(
    g_out: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn

    # What the kernel's forward leaves for its backward differs between versions, so the forward runs once more.
    context = Context()
    SelectiveScanFn.forward(context, *_time_last(u, dt, A, B, C, D, z, dt_bias), True, False)
    gradients = SelectiveScanFn.backward(context, g_out.transpose(1, 2).contiguous())
    g_u, g_dt, g_A, g_B, g_C, g_D, g_z, g_bias = gradients[:8]

    def time_first(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.transpose(1, 2).to(like.dtype).contiguous()

    return (
        time_first(g_u, u),
        time_first(g_dt, dt),
        g_A.to(A.dtype),
        time_first(g_B, B),
        time_first(g_C, C),
        g_D.to(D.dtype),
        u.new_empty(0) if z is None else time_first(g_z, z),
        g_bias.to(dt_bias.dtype),
    )


@_backward.register_fake
def _(g_out, u, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
    operands = (u, dt, A, B, C, D, u.new_empty(0) if z is None else z, dt_bias)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in operands)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_out, g_state):  # type: ignore[no-untyped-def]
    if g_state is not None:
        raise RuntimeError("selective_scan: mamba-ssm has no gradient through the final state; use backend 'triton'")
    u, dt, A, B, C, D, z, dt_bias = ctx.saved_tensors
    if g_out is None:
        return (None,) * 8
    gradients = _backward(g_out, u, dt, A, B, C, D, z, dt_bias)
    return (*gradients[:6], None if z is None else gradients[6], gradients[7])


selective_scan_mamba_ssm.register_autograd(_differentiate, setup_context=_setup_context)
