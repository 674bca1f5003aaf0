"""Causal depthwise convolution over time with an optional SiLU: one contract, several backends.

B batch, T sequence, E channels, W taps (d_conv).
"""

from __future__ import annotations

import functools

from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.causal_conv1d.naive import causal_conv1d_naive
from hymba_lightning.ops.documents import check_doc_position

registry.register_folder("causal_conv1d", __name__, causal_conv1d_naive)
available_backends = functools.partial(registry.available_backends, "causal_conv1d")


def causal_conv1d(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    *,
    activation: str | None = "silu",
    initial_state_BEW1: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = act(bias + Σ_j weight[:, W-1-j] x_{t-j}): weight[:, -1] multiplies the current token.

    The state holds the last W-1 inputs (B, E, W-1), oldest first; without an initial one they are zero. With
    `return_state` also returns it for the next piece of the sequence, in x's dtype, as is y. Arithmetic is float32.
    Differentiable in every input, also through the returned state.

    `doc_position_BT`, int32, is how many earlier tokens of its own document each token has: inputs further back are not
    in its sum. Without it a sequence is one document.

    Raises ValueError for an unknown activation, shapes that do not fit and an unknown backend, BackendUnavailableError
    for a named backend that cannot serve the call.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, not {activation!r}")
    _check_shapes(x_BTE, weight_EW, bias_E, initial_state_BEW1)
    check_doc_position("causal_conv1d", doc_position_BT, x_BTE)
    batch, _, channels = x_BTE.shape
    taps = weight_EW.size(1)
    if backend == "auto" and registry.is_one_step(x_BTE):
        backend = "naive"
    conv = registry.implementation(
        "causal_conv1d",
        backend,
        x_BTE.device.type,
        taps=int(taps),
        channels=int(channels),
        documents=doc_position_BT is not None,
    )
    if initial_state_BEW1 is None:
        initial_state_BEW1 = x_BTE.new_zeros(batch, channels, taps - 1)
    y_BTE, state_BEW1 = conv(x_BTE, weight_EW, bias_E, activation == "silu", initial_state_BEW1, doc_position_BT)
    return (y_BTE, state_BEW1) if return_state else y_BTE


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None) -> None:
    batch, length, channels = x.shape
    taps = weight.size(-1)
    wanted = [
        ("weight_EW", weight, (channels, taps)),
        ("bias_E", bias, (channels,)),
        ("initial_state_BEW1", state, (batch, channels, taps - 1)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, x and weight ask for {shape}")
    if length == 0:
        raise ValueError("causal_conv1d: x_BTE has no tokens (T = 0)")
