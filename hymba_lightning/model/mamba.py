"""The Mamba branch of the mixer (arXiv:2312.00752). B batch, T sequence, E d_inner, N d_state, R dt_rank, W d_conv."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_lightning.model.layers import Linear, rms_norm
from hymba_lightning.ops.causal_conv1d import causal_conv1d
from hymba_lightning.ops.selective_scan import selective_scan


class DepthwiseConv(nn.Module):
    """Parameters of the causal depthwise convolution: weight (E, 1, W), bias (E,), in torch's Conv1d layout."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))


class TimeStepProjection(nn.Module):
    """Parameters of dt = softplus(W dt_low + bias): weight (E, R) and bias (E,), which the scan adds in float32."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank)
        self.weight = nn.Parameter(torch.empty(channels, rank).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def draw_bias(self, dt_min: float, dt_max: float) -> None:
        """Sets the bias so that softplus(bias) is log-uniform in [dt_min, dt_max] (Mamba, section 3.6)."""
        with torch.no_grad():
            log_dt = torch.rand_like(self.bias) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
            dt = log_dt.exp()
            # Inverse of softplus, log(exp(dt) - 1), written so that small dt keeps its digits.
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def mamba_branch(
    u_BTE: Tensor,
    z_BTE: Tensor,
    conv: DepthwiseConv,
    x_proj: Linear,
    dt_proj: TimeStepProjection,
    A_log_EN: Tensor,
    D_E: Tensor,
    *,
    normalise: bool,
    conv_state: Tensor | None,
    scan_state: Tensor | None,
    return_state: bool,
    conv_backend: str,
    scan_backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution, input-dependent dt, B, C and the gated selective scan.

    u and z (B, T, E). `normalise` brings the time step's low-rank vector, B and C to an RMS of 1. Returns the gated
    output (B, T, E) before W_out, and with `return_state` the convolution's tail (B, E, W-1) and the scan's state
    (B, E, N) for the next piece of the sequence.
    """
    new_conv = new_scan = None
    conv_out = causal_conv1d(
        u_BTE,
        conv.weight[:, 0],
        conv.bias,
        activation="silu",
        initial_state_BEW1=conv_state,
        return_state=return_state,
        backend=conv_backend,
    )
    u_BTE, new_conv = conv_out if return_state else (conv_out, None)
    d_state = A_log_EN.size(1)
    dt_low_BTR, B_BTN, C_BTN = x_proj(u_BTE).split([dt_proj.weight.size(1), d_state, d_state], dim=-1)
    if normalise:
        dt_low_BTR, B_BTN, C_BTN = rms_norm(dt_low_BTR), rms_norm(B_BTN), rms_norm(C_BTN)
    dt_BTE = F.linear(dt_low_BTR, dt_proj.weight.to(u_BTE.dtype))
    scan_out = selective_scan(
        u_BTE,
        dt_BTE,
        -A_log_EN.float().exp(),
        B_BTN,
        C_BTN,
        D_E,
        z_BTE,
        dt_bias_E=dt_proj.bias,
        initial_state_BEN=scan_state,
        return_state=return_state,
        backend=scan_backend,
    )
    y_BTE, new_scan = scan_out if return_state else (scan_out, None)
    return y_BTE, new_conv, new_scan
