"""Attention over a prefix and a window block by block, on any device: memory and time linear in T.

A block of queries meets the prefix and the keys from the oldest that its first query sees to its last one's own. All
blocks have one shape and one mask, so that torch's scaled_dot_product_attention takes them as a batch. The R query
heads that share a kv head are rows of one matrix: no key is written out R times.

B batch, T queries, S keys, M prefix, H query heads, G kv heads, R = H/G, K width of a key, V width of a value, N
blocks, L queries of a block, C keys of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.prefix_window.naive import mask_of_rows, prefix_mask
from hymba_lightning.ops.registry import Backend

# Queries of a block. Keys are copied (window + block)/block times, a share block/(block + window) of the scores is
# made for nothing.
BLOCK = 256


def prefix_window_attention_blocked(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    window: int,
    prefix: int,
    scale: float,
    hidden_B: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k over the keys seen) v, (B, T, H, V) in q's dtype."""
    n_queries, n_keys = q_BTHK.size(1), k_BSGK.size(1)
    if hidden_B is not None:
        mask_BTS = mask_of_rows(n_queries, n_keys, window, prefix, hidden_B)
        return _attend(q_BTHK, k_BSGK, v_BSGV, mask_BTS, scale)
    # Queries whose window still reaches into the prefix come first, in a block of their own.
    n_first = min(max(0, prefix + window - 1 - (n_keys - n_queries)), n_queries)
    outputs = []
    if n_first:
        seen = n_keys - n_queries + n_first
        mask_TS = prefix_mask(n_first, seen, window, prefix, q_BTHK.device)
        outputs.append(_attend(q_BTHK[:, :n_first], k_BSGK[:, :seen], v_BSGV[:, :seen], mask_TS[None], scale))
    if n_first < n_queries:
        outputs.append(_in_blocks(q_BTHK[:, n_first:], k_BSGK, v_BSGV, window, prefix, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _in_blocks(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int, prefix: int, scale: float) -> Tensor:
    """Attention of queries at the end of the sequence, whose windows do not reach back into the prefix."""
    batch, n_queries = q_BTHK.shape[:2]
    block = min(BLOCK, n_queries)
    missing = -n_queries % block
    span = window - 1 + block
    first = k_BSGK.size(1) - n_queries - window + 1

    def cut(kept_BSGX: Tensor) -> Tensor:
        """(B, S, G, X) → (B*N, C, G, X): the prefix and the block's own keys."""
        local_BSGX = F.pad(kept_BSGX[:, first:], (0, 0, 0, 0, 0, missing))
        blocks_BNCGX = local_BSGX.unfold(1, span, block).movedim(-1, 2)
        prefix_BNMGX = kept_BSGX[:, None, :prefix].expand(-1, blocks_BNCGX.size(1), -1, -1, -1)
        return torch.cat([prefix_BNMGX, blocks_BNCGX], dim=2).flatten(0, 1)

    # Queries that fill the last block up have no output; real ones do not see the keys that do.
    q_XLHK = F.pad(q_BTHK, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).flatten(0, 1)
    mask_LC = prefix_mask(block, prefix + span, window, prefix, q_BTHK.device)
    out_XLHV = _attend(q_XLHK, cut(k_BSGK), cut(v_BSGV), mask_LC[None], scale)
    return out_XLHV.unflatten(0, (batch, -1)).flatten(1, 2)[:, :n_queries]


def _attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """Attention under a mask (B or 1, T, S) → (B, T, H, V)."""
    length, kv_heads, width = q_BTHK.size(1), k_BSGK.size(2), v_BSGV.size(3)
    ratio = q_BTHK.size(2) // kv_heads
    q_BGXK = q_BTHK.unflatten(2, (kv_heads, ratio)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
    if q_BTHK.device.type == "cpu" and width != q_BTHK.size(3):
        # Of one width, torch's kernel for CPUs takes them, which keeps no scores; zeros change neither q·k nor v.
        widest = max(width, q_BTHK.size(3))
        q_BGXK, k_BGSK, v_BGSV = (F.pad(x, (0, widest - x.size(3))) for x in (q_BGXK, k_BGSK, v_BGSV))
    mask_B1XS = mask_BTS.repeat(1, ratio, 1)[:, None]
    out_BGXV = F.scaled_dot_product_attention(q_BGXK, k_BGSK, v_BGSV, attn_mask=mask_B1XS, scale=scale)
    return out_BGXV[..., :width].unflatten(2, (ratio, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


BACKEND = Backend(
    "blocks of queries by torch's scaled_dot_product_attention",
    lambda: prefix_window_attention_blocked,
    auto={"any": 10},
)
