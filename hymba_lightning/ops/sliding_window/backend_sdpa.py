"""Plain causal attention, for global layers, by torch's scaled_dot_product_attention.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import DOCUMENTS, mask_of_rows


def causal_attention_sdpa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    hidden_B: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """Causal attention, softmax(scale q·k) v, whose last query is at the last key. No query sees a row's first
    `hidden_B` keys, nor keys of other documents.

    Returns a tensor of q's shape and dtype.
    """
    n_queries, n_keys = q_BTHK.size(1), k_BSGK.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    grouped = q.size(1) != k.size(1)
    if hidden_B is not None or doc_position_BT is not None:
        mask = mask_of_rows(n_queries, n_keys, None, hidden_B, doc_position_BT)[:, None]
        if grouped and n_queries == 1 and q.device.type != "cpu":
            return one_masked_query(q, k, v, mask, scale).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    elif n_queries == n_keys:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    elif n_queries == 1:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(n_queries, n_keys), scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def one_masked_query(q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B11S: Tensor, scale: float) -> Tensor:
    """(B, H, 1, K): the query heads of a kv head as rows of one matrix. torch's kernels on GPUs that take a mask do not
    take fewer kv heads than query heads: without this every key is written out for each query head."""
    grouped_BGRK = q_BH1K.squeeze(2).unflatten(1, (k_BGSK.size(1), -1))
    out_BGRK = F.scaled_dot_product_attention(grouped_BGRK, k_BGSK, v_BGSK, attn_mask=mask_B11S, scale=scale)
    return out_BGRK.flatten(1, 2)[:, :, None]


BACKEND = Backend(
    "torch's scaled_dot_product_attention",
    lambda: causal_attention_sdpa,
    refuses=(
        (
            lambda call: call.windowed,
            "sdpa serves global layers only (window None, or one that no query outgrows)",
        ),
        (
            lambda call: call.offset_on_cpu,
            "with more keys than queries it needs a dense mask on a CPU; use backend 'blocked'",
        ),
        (lambda call: call.documents and not call.one_query, f"for documents it needs a dense mask: {DOCUMENTS}"),
    ),
    auto={"any": 20},
)
