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
    table_2T1K = rope_table_op(first, length, head_dim, base, torch.empty(0, device=device))
    return table_2T1K[0], table_2T1K[1]


# An operator, so that a compiled graph makes the table once: as plain expressions the compiler writes sines, cosines
# and powers into every kernel that rotates, and computes them anew for each head and layer.
@torch.library.custom_op("hymba::rope_table", mutates_args=())
def rope_table_op(first: int, length: int, head_dim: int, base: float, like: Tensor) -> Tensor:
    """Cosines and sines (2, T, 1, K/2), float32, on the device of `like`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    position = torch.arange(first, first + length, dtype=torch.float32, device=like.device)
    angle = torch.outer(position, 1.0 / base**exponent)[:, None, :]
    return torch.stack((angle.cos(), angle.sin()))


@rope_table_op.register_fake
def _(first: int, length: int, head_dim: int, base: float, like: Tensor) -> Tensor:
    return like.new_empty((2, length, 1, head_dim // 2), dtype=torch.float32)


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
    # The gain before the rotation, with which it commutes: its gradient then needs no rotated queries kept.
    q_BTHK = rms_norm(q_BTD.view(batch, length, -1, head_dim)) * q_gain_H.to(q_BTD.dtype)[:, None]
    q_BTHK = apply_rope(q_BTHK, rope)
    k_BSGK = apply_rope(rms_norm(k_BTC.view(batch, length, -1, head_dim)), rope)
    v_BSGK = v_BTC.view(batch, length, -1, head_dim)
    if past is not None:
        k_BSGK = torch.cat([past[0], k_BSGK], dim=1)
        v_BSGK = torch.cat([past[1], v_BSGK], dim=1)
    out_BTHK = sliding_window_attention(q_BTHK, k_BSGK, v_BSGK, window=window, backend=backend)
    keep = k_BSGK.size(1) if window is None else min(window - 1, k_BSGK.size(1))
    first = k_BSGK.size(1) - keep
    return out_BTHK.reshape(batch, length, -1), (k_BSGK[:, first:], v_BSGK[:, first:])
