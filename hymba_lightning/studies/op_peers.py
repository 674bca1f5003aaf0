"""What a comparison of times runs: our backends of each op, and the other implementations there are, copies included.

Every contender takes the operands of our contract, in our layout (batch, time, channels), and returns the output alone.
A loss's targets follow from its shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops import causal_conv1d, selective_scan, sliding_window, softcapped_cross_entropy
from hymba_lightning.ops.causal_conv1d.backend_causal_conv1d import causal_conv1d_own_autograd
from hymba_lightning.ops.registry import is_installed
from hymba_lightning.ops.selective_scan.backend_mamba_ssm import selective_scan_own_autograd
from hymba_lightning.ops.sliding_window.naive import window_mask


@dataclass(frozen=True)
class Contender:
    """One implementation of an op."""

    name: str
    run: Callable[..., Tensor]
    """Operands by name -> output."""

    ours: bool = False


def mambapy_scan(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    z_BTE: Tensor,
    dt_bias_E: Tensor,
) -> Tensor:
    """mambapy's parallel scan with the steps around it in plain PyTorch; keeps the states of all tokens in memory."""
    from mambapy.pscan import pscan

    dt = F.softplus(dt_BTE.float() + dt_bias_E)
    states_BTEN = pscan(torch.exp(dt[..., None] * A_EN), (dt * u_BTE)[..., None] * B_BTN.float()[:, :, None])
    y = (states_BTEN @ C_BTN.float()[..., None]).squeeze(-1) + D_E * u_BTE
    return (y * F.silu(z_BTE.float())).to(u_BTE.dtype)


def torch_conv(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor) -> Tensor:
    """torch's depthwise conv1d, padded on both sides and cut, as most Mamba code without kernels does it."""
    weight, bias = weight_EW[:, None].to(x_BTE.dtype), bias_E.to(x_BTE.dtype)
    y_BET = F.conv1d(x_BTE.transpose(1, 2), weight, bias, padding=weight_EW.size(1) - 1, groups=x_BTE.size(2))
    return F.silu(y_BET[..., : x_BTE.size(1)]).transpose(1, 2).contiguous()


def dense_mask_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, window: int) -> Tensor:
    """scaled_dot_product_attention with the whole (T, S) mask."""
    mask = window_mask(q_BTHK.size(1), k_BSGK.size(1), window, q_BTHK.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def targets_of(logits_NV: Tensor) -> Tensor:
    """Target ids (N,) spread over the vocabulary, the same for every call."""
    return torch.arange(logits_NV.size(0), device=logits_NV.device) * 7919 % logits_NV.size(1)


def softcapped_loss(logits_NV: Tensor, *, cap: float, backend: str) -> Tensor:
    """One of our backends."""
    return softcapped_cross_entropy.softcapped_cross_entropy(logits_NV, targets_of(logits_NV), cap=cap, backend=backend)


def torch_loss(logits_NV: Tensor, *, cap: float) -> Tensor:
    """torch's cross_entropy of capped logits, as most code does it: both a capped and a float32 copy of the logits."""
    return F.cross_entropy((cap * torch.tanh(logits_NV / cap)).float(), targets_of(logits_NV), reduction="none")


def _ours(op: Callable[..., Any], available: tuple[str, ...], *skipped: str) -> list[Contender]:
    return [Contender(name, functools.partial(op, backend=name), True) for name in available if name not in skipped]


def scan_contenders(device: torch.device) -> list[Contender]:
    """mambapy first (the peer that others are divided by), then ours, then the CUDA package's own call."""
    peers = [Contender("mambapy", mambapy_scan)] if is_installed("mambapy") else []
    if device.type == "cuda" and is_installed("selective_scan_cuda"):
        peers.append(Contender("mamba-ssm, own autograd", selective_scan_own_autograd))
    return peers + _ours(selective_scan.selective_scan, selective_scan.available_backends(device), "naive")


def conv_contenders(device: torch.device) -> list[Contender]:
    """torch's conv1d first, then ours, then the CUDA package's own call."""
    peers = [Contender("F.conv1d", torch_conv)]
    if device.type == "cuda" and is_installed("causal_conv1d"):
        peers.append(Contender("causal-conv1d, own autograd", causal_conv1d_own_autograd))
    return peers + _ours(causal_conv1d.causal_conv1d, causal_conv1d.available_backends(device), "naive")


def attention_contenders(device: torch.device, window: int, length: int, dtype: torch.dtype) -> list[Contender]:
    """The dense mask first, where it fits, then ours."""
    dense = Contender("SDPA, dense mask", functools.partial(dense_mask_attention, window=window))
    skipped = ("naive", "sdpa", "flash", "fa4", "triton") if dtype == torch.float32 else ("naive", "sdpa")
    attention = functools.partial(sliding_window.sliding_window_attention, window=window)
    ours = _ours(attention, sliding_window.available_backends(device), *skipped)
    return [dense, *ours] if length <= 8192 else ours


def loss_contenders(device: torch.device, cap: float) -> list[Contender]:
    """torch's cross_entropy first, on a GPU also compiled, then ours."""
    peer = functools.partial(torch_loss, cap=cap)
    peers = [Contender("F.cross_entropy", peer)]
    if device.type == "cuda":
        peers.append(Contender("F.cross_entropy, compiled", torch.compile(peer, dynamic=False)))
    ours = functools.partial(softcapped_loss, cap=cap)
    return peers + _ours(ours, softcapped_cross_entropy.available_backends(device), "naive")
