"""Causal depthwise convolution over time with an optional SiLU: one contract, several backends.

B batch, T sequence, E channels, W taps (d_conv).
"""

from __future__ import annotations

import functools

from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.causal_conv1d.naive import causal_conv1d_naive

BACKENDS = ("naive",)

registry.register("causal_conv1d", registry.Operation(
    backends={"naive": registry.Backend(registry.anywhere)},
    order={"other": ("naive",)},
))

available_backends = functools.partial(registry.available_backends, "causal_conv1d")


def causal_conv1d(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor, *, activation: str | None = "silu",
                  initial_state_BEW1: Tensor | None = None, return_state: bool = False,
                  backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """y_t = act(bias + Σ_j weight[:, W-1-j] x_{t-j}): weight[:, -1] multiplies the current token."""
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, not {activation!r}")
    features = () if initial_state_BEW1 is None else ("initial_state",)
    registry.choose("causal_conv1d", backend, x_BTE.device.type, features)
    if initial_state_BEW1 is None:
        initial_state_BEW1 = x_BTE.new_zeros(x_BTE.size(0), weight_EW.size(0), weight_EW.size(1) - 1)
    y_BTE, state_BEW1 = causal_conv1d_naive(x_BTE, weight_EW, bias_E, activation == "silu", initial_state_BEW1)
    return (y_BTE, state_BEW1) if return_state else y_BTE
