"""Causal attention over the last `window` keys, grouped queries included: one contract, several backends.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.documents import check_doc_position
from hymba_lightning.ops.sliding_window.naive import sliding_window_attention_naive

registry.register_folder("sliding_window_attention", __name__, sliding_window_attention_naive)
available_backends = functools.partial(registry.available_backends, "sliding_window_attention")


def sliding_window_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    window: int | None,
    scale: float | None = None,
    hidden_B: Tensor | None = None,
    doc_position_BT: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q·k) v over the keys 0 <= i-j < window, where query t stands at key position i = S-T+t.

    `window` counts the keys a query sees, its own included; None is plain causal attention. Head h reads kv head
    h // (H/G). `scale` is 1/sqrt(K) unless given. Returns (B, T, H, K) in q's dtype. A sequence may be cut anywhere:
    put the last window-1 keys and values (all of them with None) before those of the next piece.

    `hidden_B`, int64, has of each row how many first keys no query of it sees, at most S-T: what pads rows that kept
    fewer keys than others. `doc_position_BT`, int32, is how many earlier tokens of its own document each query has: it
    sees no key further back.

    Raises ValueError for shapes that do not fit, a window below 1 and an unknown backend, BackendUnavailableError for a
    named backend that cannot serve the call.
    """
    _check(q_BTHK, k_BSGK, v_BSGK, window, hidden_B)
    check_doc_position("sliding_window_attention", doc_position_BT, q_BTHK)
    n_queries, n_keys, head_dim = q_BTHK.size(1), k_BSGK.size(1), q_BTHK.size(3)
    device_type = q_BTHK.device.type
    # A window that no query outgrows hides nothing: the cheaper kernels of plain causal attention will do.
    if window is not None and window >= n_keys:
        window = None
    attention = registry.implementation(
        "sliding_window_attention",
        backend,
        device_type,
        windowed=window is not None,
        hidden=hidden_B is not None,
        documents=doc_position_BT is not None,
        one_query=registry.settled(n_queries == 1),
        offset_on_cpu=registry.settled(n_keys > n_queries > 1) and device_type == "cpu",
        half_precision=q_BTHK.dtype in (torch.bfloat16, torch.float16),
        head_dim=int(head_dim),
    )
    scale = head_dim**-0.5 if scale is None else scale
    k_BSGK, v_BSGK = k_BSGK.to(q_BTHK.dtype), v_BSGK.to(q_BTHK.dtype)
    # Only those that do not refuse them know these.
    rows = {"hidden_B": hidden_B, "doc_position_BT": doc_position_BT}
    given = {name: value for name, value in rows.items() if value is not None}
    return attention(q_BTHK, k_BSGK, v_BSGK, window, scale, **given)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, hidden: Tensor | None) -> None:
    batch, n_queries, n_heads, head_dim = q.shape
    if k.dim() != 4 or k.size(0) != batch or k.size(3) != head_dim or k.shape != v.shape:
        raise ValueError(
            f"sliding_window_attention: q is {tuple(q.shape)}, so k and v must both be (B, S, G, K) = "
            f"({batch}, S, G, {head_dim}), not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.size(1) < n_queries:
        raise ValueError(f"sliding_window_attention: {k.size(1)} keys are fewer than the {n_queries} queries")
    if n_heads % k.size(2):
        raise ValueError(f"sliding_window_attention: {n_heads} query heads do not share {k.size(2)} kv heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"sliding_window_attention: window must be at least 1 (a query sees itself), not {window}")
    if hidden is not None and (hidden.shape != (batch,) or hidden.is_floating_point()):
        raise ValueError(
            f"sliding_window_attention: hidden_B must be {batch} whole numbers, one a row, not {tuple(hidden.shape)} "
            f"of {hidden.dtype}"
        )
