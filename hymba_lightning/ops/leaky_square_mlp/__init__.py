"""W_out (leaky_relu(W_in x))²: one contract, several backends. D width, F hidden width; any leading dimensions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry

registry.register_folder("leaky_square_mlp", __name__)
available_backends = functools.partial(registry.available_backends, "leaky_square_mlp")


def leaky_square_mlp(x: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float, *, backend: str = "auto") -> Tensor:
    """x (..., D) → (..., D): W_out a² with a = W_in x, negative entries of a times `slope`. All in one dtype.

    Raises ValueError for an unknown backend, BackendUnavailableError for a named one that cannot serve the call.
    """
    mlp = registry.implementation(
        "leaky_square_mlp",
        backend,
        x.device.type,
        half_precision=x.dtype in (torch.bfloat16, torch.float16),
        width=int(w_in_FD.size(1)),
        hidden=int(w_in_FD.size(0)),
    )
    return mlp(x, w_in_FD, w_out_DF, slope)
