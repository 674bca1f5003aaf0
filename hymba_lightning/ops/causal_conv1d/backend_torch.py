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


def _before_activation(padded: Tensor, weight: Tensor, bias: Tensor, length: int) -> Tensor:
    y_BTE = torch.addcmul(bias.float(), padded[:, :length], weight[:, 0].float())
    for tap in range(1, weight.size(1)):
        y_BTE.addcmul_(padded[:, tap : tap + length], weight[:, tap].float())
    return y_BTE


def _forward(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
    y_BTE = _before_activation(_padded(x, state), weight, bias, x.size(1))
    if silu:
        y_BTE = F.silu(y_BTE, inplace=True)
    return y_BTE.to(x.dtype), last_inputs(x, state)


def _backward(
    g_y: Tensor, g_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, taps = x.size(1), weight.size(1)
    padded, g_BTE = _padded(x, state), g_y.float()
    if silu:
        y_BTE = _before_activation(padded, weight, bias, length)
        g_BTE = torch.ops.aten.silu_backward(g_BTE, y_BTE)
    g_padded = torch.zeros_like(padded)
    g_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    for tap in range(taps):
        g_padded[:, tap : tap + length].addcmul_(g_BTE, weight[:, tap].float())
        g_weight[:, tap] = (g_BTE * padded[:, tap : tap + length]).sum((0, 1))
    g_padded[:, length:] += g_final.float().transpose(1, 2)
    g_state = g_padded[:, : taps - 1].transpose(1, 2).to(state.dtype, memory_format=torch.contiguous_format, copy=True)
    g_x = g_padded[:, taps - 1 :].to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return g_x, g_weight.to(weight.dtype), g_BTE.sum((0, 1)).to(bias.dtype), g_state


causal_conv1d_torch = make_conv_op("causal_conv1d_torch", _forward, _backward)
BACKEND = Backend("plain PyTorch", lambda: causal_conv1d_torch, auto={"any": 10})
