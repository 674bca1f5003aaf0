"""Attention over a prefix and a window with a dense mask: the definition of what every backend must compute.

B batch, T queries, S keys, H query heads, G kv heads, K width of a key, V width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.ops.sliding_window.naive import window_mask


def prefix_mask(n_queries: int, n_keys: int, window: int, prefix: int, device: torch.device) -> Tensor:
    """(T, S) bool, true where the query sees the key: j <= i, and j < prefix or i-j < window; i = S-T+t."""
    in_prefix_S = torch.arange(n_keys, device=device) < prefix
    causal_TS = window_mask(n_queries, n_keys, None, device)
    return window_mask(n_queries, n_keys, window, device) | (causal_TS & in_prefix_S)


def mask_of_rows(n_queries: int, n_keys: int, window: int, prefix: int, hidden_B: Tensor) -> Tensor:
    """(B, T, S) bool: `prefix_mask` without the `hidden_B` keys of each row right after the prefix."""
    place_S = torch.arange(n_keys, device=hidden_B.device)
    seen_BS = (place_S < prefix) | (place_S >= prefix + hidden_B[:, None])
    return prefix_mask(n_queries, n_keys, window, prefix, hidden_B.device) & seen_BS[:, None]


def prefix_window_attention_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    window: int,
    prefix: int,
    scale: float,
    hidden_B: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k over the keys seen) v in float32; head h reads kv head h // (H/G). Returns (B, T, H, V)."""
    n_queries, n_keys, n_kv_heads = q_BTHK.size(1), k_BSGK.size(1), k_BSGK.size(2)
    q_BTGRK = q_BTHK.float().unflatten(2, (n_kv_heads, -1))
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK.float()) * scale
    if hidden_B is None:
        seen = prefix_mask(n_queries, n_keys, window, prefix, q_BTHK.device)
    else:
        seen = mask_of_rows(n_queries, n_keys, window, prefix, hidden_B)[:, None, None]
    weights_BGRTS = scores_BGRTS.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bgrts,bsgv->btgrv", weights_BGRTS, v_BSGV.float()).flatten(2, 3).to(q_BTHK.dtype)
