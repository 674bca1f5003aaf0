"""Heads normalised, scaled and turned by position: one contract, several backends.

B batch, T sequence, H heads, K head_dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry

registry.register_folder("rotary_norm", __name__)
available_backends = functools.partial(registry.available_backends, "rotary_norm")


def rotary_norm(
    x_BTHK: Tensor, gain_H: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """rotate(gain·x / sqrt(mean(x²) + eps)) of each head, by the tables of `model.attention.rope_table`; no gain is 1.
    Raises as `registry.implementation` does, and ValueError for tables or a gain of another size."""
    width, alike = x_BTHK.size(-1), cos.dim() == 4
    compute = registry.implementation(
        "rotary_norm",
        backend,
        x_BTHK.device.type,
        loops=x_BTHK.dtype == torch.float32 and width % 32 == 0 and registry.settled(x_BTHK.size(1) > 16) and alike,
        kernels=x_BTHK.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and alike
        and width >= 32
        and width & (width - 1) == 0,
    )
    # Kernels would read beyond them.
    if alike and not cos.size(0) == sin.size(0) == x_BTHK.size(1):
        raise ValueError(f"the tables are of {cos.size(0)} and {sin.size(0)} positions for {x_BTHK.size(1)} tokens")
    if gain_H is not None and gain_H.shape != x_BTHK.shape[2:3]:
        raise ValueError(f"the gain is of shape {tuple(gain_H.shape)} for {x_BTHK.size(2)} heads")
    return compute(x_BTHK, gain_H, cos, sin, eps)
