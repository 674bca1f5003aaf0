"""Causal attention over the last `window` keys, grouped queries included: one contract, several backends.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

import functools

from torch import Tensor

from hymba_lightning.ops import registry
from hymba_lightning.ops.sliding_window.naive import sliding_window_attention_naive

BACKENDS = ("naive",)

registry.register("sliding_window_attention", registry.Operation(
    backends={"naive": registry.Backend(registry.anywhere)},
    order={"other": ("naive",)},
))

available_backends = functools.partial(registry.available_backends, "sliding_window_attention")


def sliding_window_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, window: int | None,
                             scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(scale q·k) v over the keys 0 <= i-j < window, where query t stands at key position i = S-T+t."""
    registry.choose("sliding_window_attention", backend, q_BTHK.device.type, () if window is None else ("window",))
    scale = q_BTHK.size(-1) ** -0.5 if scale is None else scale
    return sliding_window_attention_naive(q_BTHK, k_BSGK, v_BSGK, window, scale)
