"""Cross-entropy of softcapped logits, from the logits as the head made them: one contract, several backends.

N tokens, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.softcapped_cross_entropy.naive import softcapped_cross_entropy_naive

registry.register_folder("softcapped_cross_entropy", __name__, softcapped_cross_entropy_naive)
available_backends = functools.partial(registry.available_backends, "softcapped_cross_entropy")


def softcapped_cross_entropy(logits_NV: Tensor, targets_N: Tensor, *, cap: float, backend: str = "auto") -> Tensor:
    """log Σ_v exp(y_v) - y_target (N,) of y = cap·tanh(logits/cap), in nats, float32.

    The logits are raw, in float32 or a 16-bit type; arithmetic is float32, their gradient has their type. Targets are
    int64 ids of 0 … V-1: for others 'triton' returns NaN and the rest raise.

    Raises ValueError for shapes or types that do not fit, a cap that is not positive and an unknown backend,
    BackendUnavailableError for a named backend that cannot serve the call.
    """
    _check(logits_NV, targets_N, cap)
    loss = registry.implementation(
        "softcapped_cross_entropy",
        backend,
        logits_NV.device.type,
        half_precision=logits_NV.dtype != torch.float32,
        vocabulary=int(logits_NV.size(1)),
        cap=float(cap),
    )
    return loss(logits_NV, targets_N, cap)[0]


def _check(logits: Tensor, targets: Tensor, cap: float) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"softcapped_cross_entropy: logits_NV {tuple(logits.shape)} and targets_N "
            f"{tuple(targets.shape)} must be (N, V) and (N,)"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"softcapped_cross_entropy: logits_NV must be float32 or a 16-bit type, not {logits.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"softcapped_cross_entropy: targets_N must be int64, not {targets.dtype}")
    if not cap > 0:
        raise ValueError(f"softcapped_cross_entropy: cap must be positive, not {cap}")
