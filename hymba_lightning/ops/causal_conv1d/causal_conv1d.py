"""The convolution of the package causal-conv1d (CUDA), behind our contract. B batch, T sequence, E channels, W taps.

Its channels-last kernels take our layout without a copy; they want the state laid out likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.ops.causal_conv1d.custom import make_conv_op


def _channels_last(x_BEX: Tensor) -> Tensor:
    """The same (B, E, X) with the channels next to each other in memory."""
    return x_BEX.transpose(1, 2).contiguous().transpose(1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn

    y_BET, final_BEW1 = causal_conv1d_fn(x.contiguous().transpose(1, 2), weight, bias, initial_states=state,
                                         return_final_states=True, activation="silu" if silu else None)
    return y_BET.transpose(1, 2), final_BEW1


def _forward(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
    y, final = _convolve(x, weight.contiguous(), bias, silu, _channels_last(state.to(x.dtype)))
    return y.contiguous(), final.contiguous()


def _backward(g_y: Tensor, g_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool,
              state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The package offers its backward only through autograd, so the forward runs once more.
    with torch.enable_grad():
        operands = (x, weight.contiguous(), bias, _channels_last(state.to(x.dtype)))
        leaves = [t.detach().requires_grad_() for t in operands]
        y, final = _convolve(*leaves[:3], silu, leaves[3])
        g_x, g_weight, g_bias, g_state = torch.autograd.grad((y, final), leaves,
                                                             (g_y.contiguous(), _channels_last(g_final)))
    return g_x.contiguous(), g_weight.contiguous(), g_bias.contiguous(), g_state.to(state.dtype).contiguous()


causal_conv1d_package = make_conv_op("causal_conv1d_package", _forward, _backward)
