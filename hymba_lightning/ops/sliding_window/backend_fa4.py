"""Sliding-window attention of the package flash-attn-4 (Hopper and Blackwell, 16-bit), behind our contract.

Its functions take Python callables and may not be traced, so that they stand behind an operator of ours.
B batch, T queries, S keys, H query heads, G kv heads, K head_dim.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import DOCUMENTS, HIDDEN
from hymba_lightning.ops.sliding_window.operator import WITH_LOG_SUMS, make_attention_op

# Compute capabilities it has kernels for, both passes: Hopper, Blackwell of data centres.
CAPABILITIES = (9, 10, 11)
INSTALL = "pip install 'hymba-lightning[hopper]'"
# Widths whose results were compared with the definition on a GPU; at 8 and 16 its gradients are wrong, without a word.
HEAD_DIMS = (64, 128)


@functools.cache
def is_installed() -> bool:
    """Whether flash-attn-4 can be found, without importing it; it shares the name flash_attn with its elder."""
    spec = importlib.util.find_spec("flash_attn")
    return spec is not None and any(
        Path(folder, "cute", "interface.py").is_file() for folder in spec.submodule_search_locations or ()
    )


def _missing(device_type: str) -> str | None:
    """Why it cannot run on tensors of a type of device here, with the remedy; None where it can."""
    if device_type != "cuda":
        return f"it runs on cuda tensors, these are on {device_type}"
    if not is_installed():
        return f"the package flash-attn-4 is not installed: {INSTALL}"
    major = torch.cuda.get_device_capability()[0]
    if major not in CAPABILITIES:
        return f"it is made for GPUs of compute capability 9 to 11, this one has {major}: use backend 'flex' or 'flash'"
    return None


def _window_arguments(window: int) -> dict:
    # Its window counts the keys to the left of the query's own. One that all see is plain causal attention.
    return {"causal": True, "window_size_left": None if window < 1 else window - 1, "window_size_right": 0}


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    # Keeping the sums of the softmax does not depend on requires_grad, which says nothing inside an operator.
    out, log_sums = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **_window_arguments(window))[:2]
    return out, log_sums


def _backward(
    g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    gradients = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        g_out,
        log_sums,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_window_arguments(window),
    )
    g_q, g_k, g_v = (gradient.contiguous() for gradient in gradients[:3])
    return g_q, g_k, g_v


_attention = make_attention_op("sliding_window_fa4", _forward, _backward, WITH_LOG_SUMS)


def sliding_window_attention_fa4(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, window: int | None, scale: float
) -> Tensor:
    """softmax(scale q·k over the keys seen) v; the last query and the last key stand at the same place."""
    return _attention(q_BTHK, k_BSGK, v_BSGK, 0 if window is None else window, scale)[0]


BACKEND = Backend(
    "the package flash-attn-4",
    lambda: sliding_window_attention_fa4,
    devices=("cuda",),
    package="flash_attn",
    install=INSTALL,
    check=_missing,
    refuses=(
        (lambda call: call.hidden, HIDDEN),
        (lambda call: call.documents, DOCUMENTS),
        (
            lambda call: not call.half_precision,
            "flash-attn-4 takes float16 and bfloat16; cast q, k and v, or use backend 'flex'",
        ),
        (
            lambda call: call.head_dim not in HEAD_DIMS,
            "flash-attn-4 is used for heads of width 64 and 128, for which its gradients were checked; "
            "use backend 'flex'",
        ),
    ),
    auto={"cuda": 40},
)
