"""W_out (leaky_relu(W_in x))²: one contract, several backends. D width, F hidden width; any leading dimensions."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.triton_launch import hopper_missing

# Rows of the tensors that the tensor memory accelerator reads begin at multiples of 16 bytes.
WIDTH_STEP = 8

_operation = registry.Operation(
    backends={
        "torch": registry.Backend(registry.anywhere),
        "triton": registry.Backend(
            hopper_missing,
            {
                "float32": "its products are of bfloat16 or float16 matrices; cast them, or use backend 'torch'",
                "width": f"its matrices' widths are multiples of {WIDTH_STEP}; use backend 'torch'",
            },
        ),
    },
    order={"cuda": ("triton", "torch"), "other": ("torch",)},
)
registry.register("leaky_square_mlp", _operation)

BACKENDS = tuple(_operation.backends)
available_backends = functools.partial(registry.available_backends, "leaky_square_mlp")


def leaky_square_mlp(x: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float, *, backend: str = "auto") -> Tensor:
    """x (..., D) → (..., D): W_out a² with a = W_in x, negative entries of a times `slope`. All in one dtype.

    Raises ValueError for an unknown backend, BackendUnavailableError for a named one that cannot serve the call.
    """
    features: tuple[str, ...] = () if x.dtype in (torch.bfloat16, torch.float16) else ("float32",)
    if w_in_FD.size(0) % WIDTH_STEP or w_in_FD.size(1) % WIDTH_STEP:
        features += ("width",)
    if registry.choose("leaky_square_mlp", backend, x.device.type, features) == "torch":
        return F.linear(F.leaky_relu(F.linear(x, w_in_FD), slope).square(), w_out_DF)
    from hymba_lightning.ops.leaky_square_mlp.triton import LeakySquareMLP

    out = LeakySquareMLP.apply(x.flatten(0, -2), w_in_FD, w_out_DF, slope)
    return out.unflatten(0, x.shape[:-1])
