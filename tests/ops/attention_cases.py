"""Operands of window attention, and the comparison of a backend with the definition."""

import functools

import torch
from op_cases import assert_close, outputs_and_gradients, random

from hymba_lightning.ops.sliding_window import sliding_window_attention

# A call as the choice of a backend sees it, of a global layer and of one with a window.
GLOBAL = {
    "windowed": False,
    "hidden": False,
    "documents": False,
    "one_query": False,
    "offset_on_cpu": False,
    "half_precision": True,
    "head_dim": 64,
}
LOCAL = GLOBAL | {"windowed": True}


def case(batch, n_queries, n_keys, n_heads, n_kv_heads, head_dim, dtype=torch.float32, device="cpu"):
    return {
        "q_BTHK": random(batch, n_queries, n_heads, head_dim, dtype=dtype, device=device),
        "k_BSGK": random(batch, n_keys, n_kv_heads, head_dim, dtype=dtype, device=device, seed=1),
        "v_BSGK": random(batch, n_keys, n_kv_heads, head_dim, dtype=dtype, device=device, seed=2),
    }


def compare(backend, operands, window, ratio, scale=None):
    weights = (random(*operands["q_BTHK"].shape, device=operands["q_BTHK"].device, seed=3),)
    call = functools.partial(sliding_window_attention, window=window, scale=scale)
    got, gradients = outputs_and_gradients(functools.partial(call, backend=backend), operands, weights)
    expected, expected_gradients = outputs_and_gradients(functools.partial(call, backend="naive"), operands, weights)
    assert_close("out", got[0], expected[0], ratio)
    for name, reference in expected_gradients.items():
        if reference.float().abs().max() < 1e-5:
            # A query that sees one key has a constant weight: what is left of its gradients is rounding.
            assert gradients[name].float().abs().max() < 1e-4
        else:
            assert_close(f"gradient of {name}", gradients[name], reference, ratio)
