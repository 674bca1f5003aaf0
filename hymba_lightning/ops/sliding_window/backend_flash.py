"""Sliding-window attention of the package flash-attn (CUDA, 16-bit), behind our contract.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

from torch import Tensor

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import DOCUMENTS, HIDDEN


def sliding_window_attention_flash(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, window: int | None, scale: float
) -> Tensor:
    """softmax(scale q·k over the keys seen) v; the last query and the last key stand at the same place."""
    from flash_attn import flash_attn_func

    # Its window counts the keys to the left of the query's own.
    left = -1 if window is None else window - 1
    return flash_attn_func(q_BTHK, k_BSGK, v_BSGK, softmax_scale=scale, causal=True, window_size=(left, 0))


BACKEND = Backend(
    "the package flash-attn",
    lambda: sliding_window_attention_flash,
    devices=("cuda",),
    package="flash_attn",
    install="pip install flash-attn --no-build-isolation",
    refuses=(
        (lambda call: call.hidden, HIDDEN),
        (lambda call: call.documents, DOCUMENTS),
        (
            lambda call: not call.half_precision,
            "flash-attn takes float16 and bfloat16; cast q, k and v, or use backend 'flex'",
        ),
    ),
    auto={"cuda": 30},
)
