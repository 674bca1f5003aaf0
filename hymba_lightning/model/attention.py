"""The attention branch of the mixer.

B batch, T new tokens, S keys (kept ones + T), H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.model.layers import rms_norm
from hymba_lightning.ops.sliding_window import sliding_window_attention


def rope_table(first: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, K/2) in float32 of positions first … first+length-1 (RoPE, arXiv:2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(first, first + length, dtype=torch.float32, device=device)
    angle = torch.outer(position, 1.0 / base**exponent)[:, None, :]
    return angle.cos(), angle.sin()


def apply_rope(x_BTHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the two halves of the last axis: (x1*cos + x2*sin, -x1*sin + x2*cos)."""
    cos, sin = (table.to(x_BTHK.dtype) for table in rope)
    x1, x2 = x_BTHK.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def attention_branch(q_BTD: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_gain_H: Tensor, rope: tuple[Tensor, Tensor], *,
                     head_dim: int, window: int | None, past: tuple[Tensor, Tensor] | None,
                     backend: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalised, rotated, gained grouped-query attention.

    q (B, T, H*K), k and v (B, T, G*K); `past` holds the keys and values (B, P, G, K) of earlier tokens. Returns the
    branch's output (B, T, H*K) and the keys and values that the next piece of the sequence needs: the last window-1 of
    them, or all in a global layer (window None).
    """
    batch, length, _ = q_BTD.shape
    q_BTHK = apply_rope(rms_norm(q_BTD.view(batch, length, -1, head_dim)), rope)
    q_BTHK = q_BTHK * q_gain_H.to(q_BTHK.dtype)[:, None]
    k_BSGK = apply_rope(rms_norm(k_BTC.view(batch, length, -1, head_dim)), rope)
    v_BSGK = v_BTC.view(batch, length, -1, head_dim)
    if past is not None:
        k_BSGK = torch.cat([past[0], k_BSGK], dim=1)
        v_BSGK = torch.cat([past[1], v_BSGK], dim=1)
    out_BTHK = sliding_window_attention(q_BTHK, k_BSGK, v_BSGK, window=window, backend=backend)
    keep = k_BSGK.size(1) if window is None else min(window - 1, k_BSGK.size(1))
    first = k_BSGK.size(1) - keep
    return out_BTHK.reshape(batch, length, -1), (k_BSGK[:, first:], v_BSGK[:, first:])
