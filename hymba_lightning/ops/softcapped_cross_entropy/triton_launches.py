"""The cross-entropy of softcapped logits in Triton: launches and the operator around triton_kernels.

N tokens, V vocabulary. The logits are read once in each pass; no float32 tensor of their size exists.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_lightning.ops.softcapped_cross_entropy.operator import make_loss_op
from hymba_lightning.ops.softcapped_cross_entropy.triton_kernels import loss_backward, loss_forward
from hymba_lightning.ops.triton_launch import COMPILE_OPTIONS, readable

# Logits that a program of one warp holds at once.
BLOCK_V = 1024


def _constants(logits: Tensor, cap: float) -> dict:
    vocab = logits.size(1)
    block = min(BLOCK_V, triton.next_power_of_2(vocab))
    return {"V": vocab, "ROW": logits.stride(0), "CAP": cap, "BLOCK": block, **COMPILE_OPTIONS}


def _forward(logits_NV: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    logits = readable(logits_NV)
    nats, log_sums = (torch.empty(targets_N.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    with torch.cuda.device_of(logits):
        loss_forward[(logits.size(0),)](logits, targets_N.contiguous(), nats, log_sums, **_constants(logits, cap))
    return nats, log_sums


def _backward(g_nats_N: Tensor, logits_NV: Tensor, targets_N: Tensor, log_sums_N: Tensor, cap: float) -> Tensor:
    logits = readable(logits_NV)
    g_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        loss_backward[(logits.size(0),)](
            g_nats_N.contiguous(), logits, targets_N.contiguous(), log_sums_N, g_logits, **_constants(logits, cap)
        )
    return g_logits


softcapped_cross_entropy_triton = make_loss_op("softcapped_cross_entropy_triton", _forward, _backward)
