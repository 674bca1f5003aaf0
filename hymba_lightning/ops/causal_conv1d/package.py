"""The convolution of the package causal-conv1d (CUDA), behind our contract. B batch, T sequence, E channels, W taps.

Its channels-last kernels take our layout without a copy; they want the state laid out likewise.
"""

from __future__ import annotations

from torch import Tensor

from hymba_lightning.ops.causal_conv1d.custom import make_conv_op
from hymba_lightning.ops.packages import Context


def _channels_last(x_BEX: Tensor) -> Tensor:
    """The same (B, E, X) with the channels next to each other in memory."""
    return x_BEX.transpose(1, 2).contiguous().transpose(1, 2)


def _operands(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple:
    """The arguments of the package's Function: no document numbers, a final state wanted, in fresh memory."""
    # It looks at this flag to see whether the state's gradient is wanted.
    state = _channels_last(state.to(x.dtype)).detach().requires_grad_()
    return (
        x.contiguous().transpose(1, 2),
        weight.contiguous(),
        bias.contiguous(),
        None,
        state,
        True,
        None,
        "silu" if silu else None,
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor) -> tuple[Tensor, Tensor]:
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn

    y_BET, final_BEW1 = CausalConv1dFn.forward(Context(), *_operands(x, weight, bias, silu, state))
    return y_BET.detach().transpose(1, 2).contiguous(), final_BEW1.detach().contiguous()


def _backward(
    g_y: Tensor, g_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn

    context = Context()
    CausalConv1dFn.forward(context, *_operands(x, weight, bias, silu, state))
    gradients = CausalConv1dFn.backward(context, g_y.contiguous().transpose(1, 2), _channels_last(g_final))
    g_x, g_weight, g_bias, _, g_state = gradients[:5]
    return (
        g_x.transpose(1, 2).contiguous(),
        g_weight.to(weight.dtype),
        g_bias.to(bias.dtype),
        g_state.to(state.dtype).contiguous(),
    )


causal_conv1d_package = make_conv_op("causal_conv1d_package", _forward, _backward)
