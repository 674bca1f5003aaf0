"""The selective scan of the package mamba-ssm (CUDA), behind our contract: float32 dynamics, our layout, one operator.

Its kernel wants time last, so every operand and gradient is copied once in each direction. It starts from a zero state
and drops the gradient of the final one. B batch, T sequence, E channels, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
          dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # The kernel is compiled for one type of all operands that have a time axis.
    gate = None if z is None else z.to(u.dtype).transpose(1, 2).contiguous()
    u_BET, dt_BET, B_BNT, C_BNT = (x.to(u.dtype).transpose(1, 2).contiguous() for x in (u, dt, B, C))
    out_BET, state_BEN = selective_scan_fn(u_BET, dt_BET, A.float(), B_BNT, C_BNT, D.float(), gate, dt_bias.float(),
                                           delta_softplus=True, return_last_state=True)
    return out_BET.transpose(1, 2).contiguous(), state_BEN.float().contiguous()


@torch.library.custom_op("hymba::selective_scan_mamba_ssm", mutates_args=())
def selective_scan_mamba_ssm(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
                             dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The scan from a zero state: out (B, T, E) in u's dtype and the final state (B, E, N), which has no gradient."""
    with torch.no_grad():
        return _scan(u, dt, A, B, C, D, z, dt_bias)


@selective_scan_mamba_ssm.register_fake
def _(u, dt, A, B, C, D, z, dt_bias):  # type: ignore[no-untyped-def]
    return (torch.empty(u.shape, dtype=u.dtype, device=u.device),
            torch.empty((u.size(0), *A.shape), dtype=torch.float32, device=u.device))


@torch.library.custom_op("hymba::selective_scan_mamba_ssm_backward", mutates_args=())
def _backward(g_out: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
              dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # The package offers its backward only through autograd, so the forward runs once more.
    operands = [u, dt, A, B, C, D, *([] if z is None else [z]), dt_bias]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in operands]
        gate = None if z is None else leaves[6]
        out, _ = _scan(*leaves[:6], gate, leaves[-1])
        gradients = [g.contiguous() for g in torch.autograd.grad(out, leaves, g_out)]
    return (*gradients[:6], u.new_empty(0) if z is None else gradients[6], gradients[-1])


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
