"""The causal depthwise convolution in plain PyTorch: a multiply-add over the sequence for each tap, on any device.

B batch, T sequence, E channels, W taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.causal_conv1d.operator import last_inputs, make_conv_op
from hymba_lightning.ops.registry import Backend


def _padded(x: Tensor, state: Tensor) -> Tensor:
    """(B, W-1+T, E) float32: the state's inputs, then x."""
    return torch.cat([state.float().transpose(1, 2), x.float()], dim=1)


def _seen(x_BTE: Tensor, lag: int, doc_position: Tensor | None) -> Tensor:
    """x, zero where the token `lag` places before is of an earlier document."""
    return x_BTE if doc_position is None or lag == 0 else x_BTE.masked_fill((doc_position < lag)[..., None], 0)


def _before_activation(
    padded: Tensor, weight: Tensor, bias: Tensor, length: int, doc_position: Tensor | None
) -> Tensor:
    last = weight.size(1) - 1
    y_BTE = torch.addcmul(bias.float(), _seen(padded[:, :length], last, doc_position), weight[:, 0].float())
    for tap in range(1, weight.size(1)):
        y_BTE.addcmul_(_seen(padded[:, tap : tap + length], last - tap, doc_position), weight[:, tap].float())
    return y_BTE


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y_BTE = _before_activation(_padded(x, state), weight, bias, x.size(1), doc_position)
    if silu:
        y_BTE = F.silu(y_BTE, inplace=True)
    return y_BTE.to(x.dtype), last_inputs(x, state)


def _backward(
    g_y: Tensor,
    g_final: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    state: Tensor,
    doc_position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, taps = x.size(1), weight.size(1)
    padded, g_BTE = _padded(x, state), g_y.float()
    if silu:
        y_BTE = _before_activation(padded, weight, bias, length, doc_position)
        g_BTE = torch.ops.aten.silu_backward(g_BTE, y_BTE)
    g_padded = torch.zeros_like(padded)
    g_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    for tap in range(taps):
        g_seen = _seen(g_BTE, taps - 1 - tap, doc_position)
        g_padded[:, tap : tap + length].addcmul_(g_seen, weight[:, tap].float())
        g_weight[:, tap] = (g_seen * padded[:, tap : tap + length]).sum((0, 1))
    g_padded[:, length:] += g_final.float().transpose(1, 2)
    g_state = g_padded[:, : taps - 1].transpose(1, 2).to(state.dtype, memory_format=torch.contiguous_format, copy=True)
    g_x = g_padded[:, taps - 1 :].to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return g_x, g_weight.to(weight.dtype), g_BTE.sum((0, 1)).to(bias.dtype), g_state


causal_conv1d_torch = make_conv_op("causal_conv1d_torch", _forward, _backward)
BACKEND = Backend("plain PyTorch", lambda: causal_conv1d_torch, auto={"any": 10})
