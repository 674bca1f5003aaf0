"""Sliding-window attention with a dense mask: the definition of what every backend must compute.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What most backends do not serve, and which do.
HIDDEN = "rows whose first keys are hidden are served by 'sdpa' (where no query outgrows the window) and 'naive'"
DOCUMENTS = "documents within a sequence are served by 'flex' and 'triton' on a GPU, 'blocked' on a CPU, and 'naive'"


def window_mask(n_queries: int, n_keys: int, window: int | None, device: torch.device | None) -> Tensor:
    """(T, S) bool, true where the query sees the key: 0 <= i-j < window, query t at key position i = S-T+t."""
    i = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    j = torch.arange(n_keys, device=device)
    seen = j <= i
    return seen if window is None else seen & (i - j < window)


def mask_of_rows(
    n_queries: int, n_keys: int, window: int | None, hidden_B: Tensor | None, doc_position_BT: Tensor | None = None
) -> Tensor:
    """(B, T, S) bool: `window_mask` without each row's first `hidden_B` keys, and those of documents before a query's
    own, which are more than `doc_position` back. One of the two is needed."""
    device = next((rows.device for rows in (hidden_B, doc_position_BT) if rows is not None), None)
    seen_BTS = window_mask(n_queries, n_keys, window, device)[None]
    if hidden_B is not None:
        seen_BTS = seen_BTS & (torch.arange(n_keys, device=device) >= hidden_B[:, None])[:, None]
    if doc_position_BT is not None:
        i_T = torch.arange(n_keys - n_queries, n_keys, device=device)
        first_BT = i_T - doc_position_BT
        seen_BTS = seen_BTS & (torch.arange(n_keys, device=device) >= first_BT[..., None])
    return seen_BTS


def sliding_window_attention_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    hidden_B: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k over the keys seen) v in float32; head h reads kv head h // (H/G). Returns q's shape, dtype."""
    batch, n_queries, n_heads, head_dim = q_BTHK.shape
    n_keys, n_kv_heads = k_BSGK.shape[1:3]
    q = q_BTHK.float().view(batch, n_queries, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q, k_BSGK.float()) * scale
    if hidden_B is None and doc_position_BT is None:
        seen = window_mask(n_queries, n_keys, window, q.device)
    else:
        seen = mask_of_rows(n_queries, n_keys, window, hidden_B, doc_position_BT)[:, None, None]
    weights_BGRTS = scores_BGRTS.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK.float())
    return out.reshape(q_BTHK.shape).to(q_BTHK.dtype)
