"""The cross-entropy of softcapped logits in plain PyTorch, a block of tokens at a time, on any device.

N tokens, V vocabulary, R tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.softcapped_cross_entropy.operator import make_loss_op

# Float32 logits of a block, of which forward holds one and backward two: what a CPU's caches hold, and elsewhere enough
# for a launch to be worth it.
CPU_BLOCK_LOGITS = 2**18
BLOCK_LOGITS = 2**23


def _blocks(logits: Tensor) -> Iterator[slice]:
    block = CPU_BLOCK_LOGITS if logits.device.type == "cpu" else BLOCK_LOGITS
    rows = max(1, block // logits.size(1))
    return (slice(first, first + rows) for first in range(0, logits.size(0), rows))


def _tanh(logits_RV: Tensor, cap: float) -> Tensor:
    return logits_RV.to(torch.float32, copy=True).div_(cap).tanh_()


# Each block has a function of its own: a loop's variables would keep one block while the next is made.
def _block_loss(logits_RV: Tensor, targets_R: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    y_RV = _tanh(logits_RV, cap).mul_(cap)
    y_target_R1 = y_RV.gather(1, targets_R[:, None])
    largest_R1 = y_RV.amax(1, keepdim=True)
    log_sums_R1 = y_RV.sub_(largest_R1).exp_().sum(1, keepdim=True).log_().add_(largest_R1)
    return (log_sums_R1 - y_target_R1)[:, 0], log_sums_R1[:, 0]


def _block_gradient(g_nats_R: Tensor, logits_RV: Tensor, targets_R: Tensor, log_sums_R: Tensor, cap: float) -> Tensor:
    tanh_RV = _tanh(logits_RV, cap)
    g_RV = (tanh_RV * cap).sub_(log_sums_R[:, None]).exp_()
    g_RV.scatter_add_(1, targets_R[:, None], torch.full_like(g_RV[:, :1], -1.0))
    slope_RV = tanh_RV.square_().neg_().add_(1.0)
    return g_RV.mul_(slope_RV).mul_(g_nats_R[:, None])


def _forward(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    nats, log_sums = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    for rows in _blocks(logits):
        nats[rows], log_sums[rows] = _block_loss(logits[rows], targets[rows], cap)
    return nats, log_sums


def _backward(g_nats: Tensor, logits: Tensor, targets: Tensor, log_sums: Tensor, cap: float) -> Tensor:
    g_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _blocks(logits):
        g_logits[rows] = _block_gradient(g_nats[rows], logits[rows], targets[rows], log_sums[rows], cap)
    return g_logits


softcapped_cross_entropy_torch = make_loss_op("softcapped_cross_entropy_torch", _forward, _backward)
BACKEND = Backend("plain PyTorch, block by block", lambda: softcapped_cross_entropy_torch, auto={"any": 10})
