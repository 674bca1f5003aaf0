"""What is timed of each op: operands, the definition, contenders, and the least work that a machine must do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.ops import causal_conv1d, selective_scan, sliding_window
from hymba_lightning.studies.op_peers import (
    Contender,
    attention_contenders,
    conv_contenders,
    loss_contenders,
    scan_contenders,
    softcapped_loss,
)

OPS = ("scan", "conv", "attention", "loss")

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """An op at one size."""

    title: str
    operands: Callable[[int], Operands]
    """Length -> random operands."""

    length: int
    definition: Callable[..., Any]
    contenders: list[Contender]
    megabytes: float
    """What forward and backward must at least read and write, once each."""

    gigaflops: float
    """Matrix products of forward and backward, nothing outside the band and nothing recomputed."""


def scan_subject(
    batch: int, length: int, channels: int, states: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """The gated selective scan."""

    def operands(tokens: int) -> Operands:
        wide = functools.partial(torch.randn, batch, tokens, dtype=dtype, device=device)
        return {
            "u_BTE": wide(channels),
            "dt_BTE": wide(channels),
            "A_EN": -3 * torch.rand(channels, states, device=device),
            "B_BTN": wide(states),
            "C_BTN": wide(states),
            "D_E": torch.randn(channels, device=device),
            "z_BTE": wide(channels),
            "dt_bias_E": torch.randn(channels, device=device) - 3,
        }

    # Forward reads u, dt, z, B, C and writes out; backward reads those and g_out, and writes five gradients.
    values = batch * length * (11 * channels + 6 * states)
    return Subject(
        f"selective scan, forward + backward (B {batch}, T {length:,}, E {channels}, N {states})",
        operands,
        length,
        functools.partial(selective_scan.selective_scan, backend="naive"),
        scan_contenders(device),
        values * dtype.itemsize / 1e6,
        0.0,
    )


def conv_subject(
    batch: int, length: int, channels: int, taps: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """The causal convolution with SiLU."""

    def operands(tokens: int) -> Operands:
        return {
            "x_BTE": torch.randn(batch, tokens, channels, dtype=dtype, device=device),
            "weight_EW": torch.randn(channels, taps, device=device),
            "bias_E": torch.randn(channels, device=device),
        }

    # Forward reads x and writes y; backward reads x and g_y and writes g_x.
    return Subject(
        f"causal convolution + SiLU, forward + backward (B {batch}, T {length:,}, E {channels}, W {taps})",
        operands,
        length,
        functools.partial(causal_conv1d.causal_conv1d, backend="naive"),
        conv_contenders(device),
        5 * batch * length * channels * dtype.itemsize / 1e6,
        0.0,
    )


def attention_subject(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Subject:
    """Sliding-window attention."""

    def operands(tokens: int) -> Operands:
        make = functools.partial(torch.randn, dtype=dtype, device=device)
        return {
            "q_BTHK": make(batch, tokens, heads, head_dim),
            "k_BSGK": make(batch, tokens, kv_heads, head_dim),
            "v_BSGK": make(batch, tokens, kv_heads, head_dim),
        }

    seen = length * window - window * (window - 1) / 2 if window < length else length * (length + 1) / 2
    # Two products forward, four backward, of 2·K operations for each pair of a query and a key it sees.
    flops = 6 * 2 * batch * heads * head_dim * seen
    values = batch * length * head_dim * (6 * heads + 6 * kv_heads)
    shape = f"B {batch}, T {length:,}, heads {heads}:{kv_heads}, K {head_dim}, window {window}"
    definition = functools.partial(sliding_window.sliding_window_attention, window=window, backend="naive")
    return Subject(
        f"window attention, forward + backward ({shape})",
        operands,
        length,
        definition,
        attention_contenders(device, window, length, dtype),
        values * dtype.itemsize / 1e6,
        flops / 1e9,
    )


def loss_subject(tokens: int, vocab: int, cap: float, device: torch.device, dtype: torch.dtype) -> Subject:
    """The cross-entropy of softcapped logits."""

    def operands(n_tokens: int) -> Operands:
        return {"logits_NV": 10 * torch.randn(n_tokens, vocab, dtype=dtype, device=device)}

    # Forward reads the logits; backward reads them and writes their gradient.
    return Subject(
        f"softcapped cross-entropy, forward + backward (N {tokens:,}, V {vocab:,}, cap {cap:g})",
        operands,
        tokens,
        functools.partial(softcapped_loss, cap=cap, backend="naive"),
        loss_contenders(device, cap),
        3 * tokens * vocab * dtype.itemsize / 1e6,
        0.0,
    )


def subjects(op: str, device: torch.device, dtype: torch.dtype) -> list[Callable[[], Subject]]:
    """An op at the sizes of training on a GPU, or at such as a CPU can do; made when they are called."""
    on_gpu = device.type == "cuda"
    batch, length, channels, kv_heads = (2, 32768, 512, 4) if on_gpu else (1, 4096, 256, 8)
    if op == "attention":
        sizes = (4096, 32768)
        return [
            functools.partial(attention_subject, batch, size, 8, kv_heads, 64, 512, device, dtype) for size in sizes
        ]
    if op == "loss":
        return [functools.partial(loss_subject, batch * length, 1024, 30.0, device, dtype)]
    if op == "conv":
        return [functools.partial(conv_subject, batch, length, channels, 4, device, dtype)]
    return [functools.partial(scan_subject, batch, length, channels, 8, device, dtype)]
