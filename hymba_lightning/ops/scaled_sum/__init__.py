"""A sum with a gain for each channel, and its RMS norm: one contract, several backends.

D width; any leading dimensions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry

registry.register_folder("scaled_sum", __name__)
available_backends = functools.partial(registry.available_backends, "scaled_sum")


def scaled_sum(
    x: Tensor,
    y: Tensor,
    gain_x_D: Tensor | None,
    gain_y_D: Tensor | None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """gain_x·x + gain_y·y (..., D) of x and y alike, and that divided by the root of its mean square plus `eps`, or
    once more without `eps`; no gain is 1. Raises as `registry.implementation` does."""
    compute = registry.implementation(
        "scaled_sum",
        backend,
        x.device.type,
        loops=gain_y_D is not None
        and x.dtype == torch.float32
        and x.size(-1) % 16 == 0
        and registry.settled(x.numel() > 16 * x.size(-1)),
    )
    return compute(x, y, gain_x_D, gain_y_D, eps)
