"""Causal attention over the last `window` keys and, from anywhere, the first `prefix` ones; values may be wider or
narrower than keys.

B batch, T queries, S keys, M prefix, H query heads, G kv heads, K width of a key, V width of a value.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.prefix_window.naive import prefix_window_attention_naive

registry.register_folder("prefix_window_attention", __name__, prefix_window_attention_naive)
available_backends = functools.partial(registry.available_backends, "prefix_window_attention")


def prefix_window_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int,
    prefix: int,
    scale: float | None = None,
    hidden_B: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q·k) v over the keys j <= i that are among the first `prefix` or satisfy i-j < window, where query
    t stands at key position i = S-T+t.

    Head h reads kv head h // (H/G). `scale` is 1/sqrt(K) unless given. Returns (B, T, H, V) in q's dtype. A sequence
    may be cut anywhere: put the keys and values of the prefix and the last window-1 others before those of the next
    piece.

    `hidden_B`, int64, has of each row how many keys right after the prefix no query of it sees, at most S-T-M.

    Raises ValueError for shapes that do not fit, a window or a prefix below 1 and an unknown backend,
    BackendUnavailableError for a named backend that cannot serve the call.
    """
    _check(q_BTHK, k_BSGK, v_BSGV, window, prefix, hidden_B)
    attention = registry.implementation(
        "prefix_window_attention", backend, q_BTHK.device.type, hidden=hidden_B is not None
    )
    scale = q_BTHK.size(3) ** -0.5 if scale is None else scale
    k_BSGK, v_BSGV = k_BSGK.to(q_BTHK.dtype), v_BSGV.to(q_BTHK.dtype)
    if hidden_B is None:
        return attention(q_BTHK, k_BSGK, v_BSGV, window, prefix, scale)
    return attention(q_BTHK, k_BSGK, v_BSGV, window, prefix, scale, hidden_B)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, prefix: int, hidden: Tensor | None) -> None:
    batch, n_queries, n_heads, width = q.shape
    if k.dim() != 4 or k.size(0) != batch or k.size(3) != width or k.shape[:3] != v.shape[:3] or v.dim() != 4:
        raise ValueError(
            f"prefix_window_attention: q is {tuple(q.shape)}, so k must be ({batch}, S, G, {width}) and v ({batch}, S, "
            f"G, V), not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if n_heads % k.size(2):
        raise ValueError(f"prefix_window_attention: {n_heads} query heads do not share {k.size(2)} kv heads evenly")
    if k.size(1) < n_queries:
        raise ValueError(f"prefix_window_attention: {k.size(1)} keys are fewer than the {n_queries} queries")
    if window < 1 or not 1 <= prefix <= k.size(1):
        raise ValueError(
            f"prefix_window_attention: window={window} must be at least 1 (a query sees itself) and prefix={prefix} "
            f"from 1 to the {k.size(1)} keys there are"
        )
    if hidden is not None and (hidden.shape != (batch,) or hidden.dtype != torch.int64):
        raise ValueError(
            f"prefix_window_attention: hidden_B must be {batch} whole numbers, one a row, not {tuple(hidden.shape)} of "
            f"{hidden.dtype}"
        )
