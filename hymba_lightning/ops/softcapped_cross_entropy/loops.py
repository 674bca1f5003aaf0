"""The cross-entropy of softcapped logits as one native loop for the CPU, compiled by numba; forward and backward.

A work item is a run of tokens. N tokens, V vocabulary. No logit is over the cap, so that no largest one is needed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hymba_lightning.ops.lanes import LANES, LOG2E, exp2, f32, load, splat, store, total
from hymba_lightning.ops.native import flat, native_loop, rows, run_items
from hymba_lightning.ops.softcapped_cross_entropy.operator import make_loss_op

# Tokens of a work item.
RUN = 64


@njit(inline="always")
def _tanh(x):
    """1 - 2 / (1 + exp(2 x)), good to a few units in the last place of 1."""
    return splat(f32(1)) - splat(f32(2)) / (splat(f32(1)) + exp2(splat(f32(2) * LOG2E) * x))


@native_loop
def _forward(first, last, count, width, logits, row, targets, cap, nats, log_sums):
    """Work items first … last-1. nats, log_sums (N,)."""
    inverse = splat(f32(1) / cap)
    for token in range(first * RUN, min(last * RUN, count)):
        # Σ exp(y - cap): from exp(-2 cap) to V.
        sums = splat(f32(0))
        for c in range(token * row, token * row + width, LANES):
            sums = sums + exp2(splat(cap * LOG2E) * (_tanh(load(logits, c) * inverse) - splat(f32(1))))
        log_sums[token] = cap + np.log(total(sums))
        nats[token] = log_sums[token] - cap * math.tanh(logits[token * row + targets[token]] / cap)


@native_loop
def _backward(first, last, count, width, logits, row, targets, cap, g_nats, log_sums, g_logits):
    """Work items first … last-1. g_logits (N, V)."""
    inverse, one = splat(f32(1) / cap), splat(f32(1))
    for token in range(first * RUN, min(last * RUN, count)):
        offset, factor = splat(log_sums[token] * LOG2E), splat(g_nats[token])
        for c in range(0, width, LANES):
            tanh = _tanh(load(logits, token * row + c) * inverse)
            slope = (one - tanh * tanh) * factor
            store(g_logits, token * width + c, exp2(splat(cap * LOG2E) * tanh - offset) * slope)
        tanh = math.tanh(logits[token * row + targets[token]] / cap)
        g_logits[token * width + targets[token]] -= (f32(1) - tanh * tanh) * g_nats[token]


def _operands(logits: Tensor, targets: Tensor, cap: float) -> tuple:
    """The arguments that both kernels begin with, after the work items."""
    if logits.size(0) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.size(1):
        raise IndexError(f"targets from {targets.min()} to {targets.max()} are not ids below {logits.size(1)}")
    return *logits.shape, *rows(logits[None]), targets.contiguous().numpy(), f32(cap)


def _items(logits: Tensor) -> int:
    return -(-logits.size(0) // RUN)


def _forward_numba(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    nats, log_sums = (torch.empty(targets.shape, dtype=torch.float32) for _ in range(2))
    arguments = (*_operands(logits, targets, cap), flat(nats), flat(log_sums))
    run_items(
        _forward, "softcapped cross-entropy", _items(logits), float(logits.numel()), arguments, torch.get_num_threads()
    )
    return nats, log_sums


def _backward_numba(g_nats: Tensor, logits: Tensor, targets: Tensor, log_sums: Tensor, cap: float) -> Tensor:
    g_logits = torch.empty(logits.shape, dtype=torch.float32)
    arguments = (*_operands(logits, targets, cap), flat(g_nats), flat(log_sums), flat(g_logits))
    run_items(
        _backward,
        "softcapped cross-entropy's gradient",
        _items(logits),
        float(logits.numel()),
        arguments,
    )
    return g_logits


softcapped_cross_entropy_numba = make_loss_op("softcapped_cross_entropy_numba", _forward_numba, _backward_numba)
