"""The convolution of the package causal-conv1d (CUDA), behind our contract. B batch, T sequence, E channels, W taps.

Its channels-last kernels take our layout without a copy; they want the state laid out likewise.
"""

from __future__ import annotations

from torch import Tensor

from hymba_lightning.ops.causal_conv1d.operator import make_conv_op
from hymba_lightning.ops.operators import FunctionContext
from hymba_lightning.ops.registry import Backend


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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, silu: bool, state: Tensor, _documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn

    y_BET, final_BEW1 = CausalConv1dFn.forward(FunctionContext(), *_operands(x, weight, bias, silu, state))
    return y_BET.detach().transpose(1, 2).contiguous(), final_BEW1.detach().contiguous()


def _backward(
    g_y: Tensor,
    g_final: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    state: Tensor,
    _documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn

    context = FunctionContext()
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


def causal_conv1d_own_autograd(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor) -> Tensor:
    """The package's convolution and SiLU as others call it, for comparisons of time: x (B, T, E) → (B, T, E)."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x_BTE.transpose(1, 2), weight_EW, bias_E, activation="silu").transpose(1, 2)


BACKEND = Backend(
    "the package causal-conv1d",
    lambda: causal_conv1d_package,
    devices=("cuda",),
    package="causal_conv1d",
    install="pip install causal-conv1d --no-build-isolation",
    refuses=(
        (lambda call: not 2 <= call.taps <= 4, "causal-conv1d has 2 to 4 taps; use backend 'triton' or 'torch'"),
        (
            lambda call: call.channels % 8 != 0,
            "causal-conv1d wants a multiple of 8 channels; use backend 'triton' or 'torch'",
        ),
        (
            lambda call: call.documents,
            "causal-conv1d takes documents within a sequence or a state before it, not both; use backend 'triton' or "
            "'torch'",
        ),
    ),
    auto={"cuda": 20},
)
