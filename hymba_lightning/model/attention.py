"""The attention branch of a block: queries and keys normalised, rotated by position and compared inside a window.

It comes without its projections, which the block makes together with the recurrent branch's as one matrix product.
Sources: RoPE, arXiv:2104.09864; grouped queries, arXiv:2305.13245; normalised queries and keys, arXiv:2010.04245.

B batch, T new tokens, S keys (kept ones + T), H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.model.layers import RMS_EPS
from hymba_lightning.ops.rotary_norm import rotary_norm
from hymba_lightning.ops.sliding_window import sliding_window_attention


def rope_table(first: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which `rotate` turns heads at the positions first … first + length - 1 (RoPE,
    arXiv:2104.09864), float32.

    Returns the cosines (T, 1, 1, K/2), and the sines (T, 1, 2, K/2): as they are for the first half of a head, negated
    for the second.
    """
    return rope_table_op(first, length, head_dim, base, torch.empty(0, device=device))


def rope_table_of_rows(first_B: Tensor, length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """`rope_table` of rows that stand at positions of their own: (B, T, 1, 1, K/2) and (B, T, 1, 2, K/2)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=first_B.device) / head_dim
    position_BT = first_B[:, None] + torch.arange(length, device=first_B.device)
    angle = position_BT[:, :, None, None, None].float() * (1.0 / base**exponent)
    sin = angle.sin()
    return angle.cos(), torch.cat((sin, -sin), dim=-2)


# An operator, so that a compiled graph makes the table once: as plain expressions the compiler writes sines, cosines
# and powers into every kernel that rotates, and computes them anew for each head and layer.
@torch.library.custom_op("hymba::rope_table", mutates_args=())
def rope_table_op(first: int, length: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_table` as an operator; the tables are made on the device of `like`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    position = torch.arange(first, first + length, dtype=torch.float32, device=like.device)
    angle = torch.outer(position, 1.0 / base**exponent)[:, None, :]
    sin = angle.sin()
    return angle.cos()[:, None], torch.stack((sin, -sin), dim=-2)


@rope_table_op.register_fake
def _(first: int, length: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty((length, 1, 1, head_dim // 2), dtype=torch.float32),
        like.new_empty((length, 1, 2, head_dim // 2), dtype=torch.float32),
    )


def turn_back(keys_BPGK: Tensor, shift: int | Tensor, base: float) -> Tensor:
    """Rotates keys (B, P, G, K) back by `shift` positions: one number for all rows, or a tensor (B,), one for each."""
    head_dim = keys_BPGK.size(-1)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=keys_BPGK.device) / head_dim
    turns = shift[:, None, None, None] if isinstance(shift, Tensor) else shift
    angle = -turns * (1.0 / base**exponent).double()
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = keys_BPGK.double().chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(keys_BPGK.dtype)


def attention_branch(
    q_BTD: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    q_gain_H: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    head_dim: int,
    window: int | None,
    past: tuple[Tensor, Tensor, Tensor | None] | None,
    backend: str,
    doc_position_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Grouped-query attention of T new tokens to themselves and to what is kept of the tokens before.

    Args:
        q_BTD: Queries (B, T, H·K) as projected.
        k_BTC: Keys (B, T, G·K) as projected.
        v_BTC: Values (B, T, G·K).
        q_gain_H: (H,), what normalised queries are multiplied with.
        rope: `rope_table` of the new tokens' positions.
        head_dim: K.
        window: Keys that a token sees, itself included; None for all before it (a global layer).
        past: What the last call returned: keys and values (B, P, G, K) of earlier tokens, and how many of each row's
            first ones are padding (B,), or None without padding. None at the start of a sequence.
        backend: Of `sliding_window_attention`.

    Returns:
        The branch's output (B, T, H·K), and `past` for the call with the next tokens: the last window - 1 keys and
        values, or all of them in a global layer.

    Raises:
        BackendUnavailableError: the backend cannot serve this call.
    """
    batch, length, _ = q_BTD.shape
    q_BTHK = rotary_norm(q_BTD.view(batch, length, -1, head_dim), q_gain_H, *rope, RMS_EPS)
    k_BSGK = rotary_norm(k_BTC.view(batch, length, -1, head_dim), None, *rope, RMS_EPS)
    v_BSGK = v_BTC.view(batch, length, -1, head_dim)
    hidden_B = None
    if past is not None:
        hidden_B = past[2]
        k_BSGK = torch.cat([past[0], k_BSGK], dim=1)
        v_BSGK = torch.cat([past[1], v_BSGK], dim=1)
    out_BTHK = sliding_window_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        window=window,
        # No padding is of a query's document: its position says all.
        hidden_B=None if doc_position_BT is not None else hidden_B,
        doc_position_BT=doc_position_BT,
        backend=backend,
    )
    keep = k_BSGK.size(1) if window is None else min(window - 1, k_BSGK.size(1))
    first = k_BSGK.size(1) - keep
    hidden_B = None if hidden_B is None else (hidden_B - first).clamp_min(0)
    return out_BTHK.reshape(batch, length, -1), (k_BSGK[:, first:], v_BSGK[:, first:], hidden_B)
