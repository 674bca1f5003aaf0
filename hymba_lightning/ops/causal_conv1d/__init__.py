"""Causal depthwise convolution over time with an optional SiLU: one contract, several backends.

B batch, T sequence, E channels, W taps (d_conv).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.causal_conv1d.naive import causal_conv1d_naive

_operation = registry.Operation(
    backends={
        "naive": registry.Backend(registry.anywhere),
        "torch": registry.Backend(registry.anywhere),
        "numba": registry.Backend(registry.needs_package("numba", "pip install numba", "cpu")),
        "triton": registry.Backend(registry.needs_triton),
        "causal_conv1d": registry.Backend(
            registry.needs_package("causal_conv1d", "pip install causal-conv1d --no-build-isolation", "cuda"),
            {
                "taps": "causal-conv1d has 2 to 4 taps; use backend 'triton' or 'torch'",
                "channels": "causal-conv1d wants a multiple of 8 channels; use backend 'triton' or 'torch'",
            },
        ),
    },
    order={"cpu": ("numba", "torch"), "cuda": ("triton", "causal_conv1d", "torch"), "other": ("torch",)},
)
registry.register("causal_conv1d", _operation)

BACKENDS = tuple(_operation.backends)
available_backends = functools.partial(registry.available_backends, "causal_conv1d")


def causal_conv1d(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    *,
    activation: str | None = "silu",
    initial_state_BEW1: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = act(bias + Σ_j weight[:, W-1-j] x_{t-j}): weight[:, -1] multiplies the current token.

    The state holds the last W-1 inputs (B, E, W-1), oldest first; without an initial one they are zero. With
    `return_state` also returns it for the next piece of the sequence, in x's dtype, as is y. Arithmetic is float32.
    Differentiable in every input, also through the returned state.

    Raises ValueError for an unknown activation, shapes that do not fit and an unknown backend, BackendUnavailableError
    for a named backend that cannot serve the call.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, not {activation!r}")
    _check_shapes(x_BTE, weight_EW, bias_E, initial_state_BEW1)
    batch, _, channels = x_BTE.shape
    taps = weight_EW.size(1)
    features = (() if 2 <= taps <= 4 else ("taps",)) + (() if channels % 8 == 0 else ("channels",))
    if backend == "auto" and registry.is_one_step(x_BTE):
        backend = "naive"
    name = registry.choose("causal_conv1d", backend, x_BTE.device.type, features)
    if initial_state_BEW1 is None:
        initial_state_BEW1 = x_BTE.new_zeros(batch, channels, taps - 1)
    if name == "triton":
        from hymba_lightning.ops.causal_conv1d.triton import causal_conv1d_triton

        return causal_conv1d_triton(
            x_BTE,
            weight_EW,
            bias_E,
            activation=activation,
            initial_state_BEW1=initial_state_BEW1,
            return_state=return_state,
        )
    y_BTE, state_BEW1 = _implementation(name)(x_BTE, weight_EW, bias_E, activation == "silu", initial_state_BEW1)
    return (y_BTE, state_BEW1) if return_state else y_BTE


def _implementation(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of x, weight, bias, silu and the state that returns y and the new state."""
    if name == "numba":
        from hymba_lightning.ops.causal_conv1d.numba import causal_conv1d_numba

        return causal_conv1d_numba
    if name == "torch":
        from hymba_lightning.ops.causal_conv1d.torch import causal_conv1d_torch

        return causal_conv1d_torch
    if name == "causal_conv1d":
        from hymba_lightning.ops.causal_conv1d.package import causal_conv1d_package

        return causal_conv1d_package
    return causal_conv1d_naive


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
