"""Every backend of window attention against the dense mask, and the window's edge, key by key."""

import functools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import GLOBAL, LOCAL, case, compare
from op_cases import NEEDS_GPU, RATIO, assert_close, on, outputs_and_gradients, random

from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose
from hymba_lightning.ops.sliding_window import available_backends, backend_sdpa, sliding_window_attention
from hymba_lightning.ops.sliding_window import backend_fa4 as fa4
from hymba_lightning.ops.sliding_window import compiled_flex as flex
from hymba_lightning.ops.sliding_window.naive import mask_of_rows

# (B, T, S, H, G, K, window)
SHAPES = [
    (2, 63, 63, 6, 2, 12, 20),
    (1, 300, 300, 4, 4, 16, 128),
    (1, 260, 390, 4, 1, 8, 100),
    (2, 1, 40, 2, 1, 8, 5),
    (1, 1, 1, 2, 2, 8, 4),
    (1, 70, 90, 4, 2, 8, 1),
    (1, 50, 50, 2, 1, 8, 500),
    (1, 140, 200, 2, 2, 8, None),
    (1, 150, 1300, 4, 2, 40, 900),
    (1, 600, 600, 3, 1, 16, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "device"), on("cpu", "blocked", "numba") + on("cuda", "flex", "flash", "fa4", "triton")
)
def test_backend_matches_naive(backend, shape, dtype, device):
    # What a CPU runs on is required, so that nothing is left out there.
    if device == "cuda" and backend not in available_backends(device):
        pytest.skip(f"{backend} is not installed")
    *sizes, window = shape
    if backend in ("flash", "fa4", "triton") and dtype == torch.float32:
        pytest.skip(f"{backend} has no float32")
    if backend in ("fa4", "triton"):
        sizes[-1] = 64  # it takes no narrower heads
    # A GPU's tensor cores round float32 factors to 10 bits and bfloat16 weights before the second product.
    ratio = {torch.float32: 2e-3, torch.bfloat16: 2e-2} if device == "cuda" else RATIO
    compare(backend, case(*sizes, dtype=dtype, device=device), window, ratio[dtype])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(60, 60), (1, 60), pytest.param(30, 60, id="offset")])
def test_sdpa_matches_naive(n_queries, n_keys, device):
    operands = case(2, n_queries, n_keys, 4, 2, 8, device=device)
    ratio = RATIO[torch.float32] if device == "cpu" else 2e-3
    if device == "cpu" and n_keys > n_queries > 1:
        with pytest.raises(BackendUnavailableError, match="dense mask on a CPU; use backend 'blocked'"):
            sliding_window_attention(**operands, window=None, backend="sdpa")
    else:
        compare("sdpa", operands, None, ratio)
    with pytest.raises(BackendUnavailableError, match="global layers only"):
        sliding_window_attention(**operands, window=9, backend="sdpa")


def test_sdpa_aligns_the_last_query_with_the_last_key():
    from hymba_lightning.ops.sliding_window.backend_sdpa import causal_attention_sdpa

    operands = case(2, 30, 60, 4, 2, 8)
    expected = sliding_window_attention(**operands, window=None, backend="naive")
    assert_close("out", causal_attention_sdpa(*operands.values(), None, 8**-0.5), expected, RATIO[torch.float32])


@pytest.mark.parametrize("window", [1, 7, 16, 40, None])
@pytest.mark.parametrize("backend", ["naive", "blocked", "numba", "flex"])
def test_a_query_sees_exactly_its_window(backend, window, monkeypatch):
    """With unit vectors as values the output is the row of weights: positive where 0 <= i-j < window, else zero."""
    n_queries, n_keys = 33, 40
    operands = case(1, n_queries, n_keys, 1, 1, n_keys) | {"v_BSGK": torch.eye(n_keys)[None, :, None]}
    if backend == "flex":
        monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
        out = flex.sliding_window_attention_flex(*operands.values(), window, 1.0)
    else:
        out = sliding_window_attention(**operands, window=window, scale=1.0, backend=backend)
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    seen = (distance >= 0) & (distance < (window or n_keys))
    assert torch.equal(out[0, :, 0] > 0, seen)


def test_naive_is_masked_attention_with_kv_heads_repeated():
    operands = case(2, 20, 20, 6, 2, 8)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    q, k, v = (x.transpose(1, 2) for x in operands.values())
    expected = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(3, dim=1),
        v.repeat_interleave(3, dim=1),
        attn_mask=(distance >= 0) & (distance < 6),
        scale=0.3,
    ).transpose(1, 2)
    torch.testing.assert_close(sliding_window_attention(**operands, window=6, scale=0.3, backend="naive"), expected)


@pytest.mark.parametrize("backend", ["naive", "blocked", "numba"])
@pytest.mark.parametrize("window", [5, 70, None])
def test_sequence_may_be_cut_anywhere(backend, window):
    operands = case(2, 200, 200, 4, 2, 8)

    def in_pieces(q_BTHK, k_BSGK, v_BSGK):
        pieces = []
        for first, last in ((0, 1), (1, 64), (64, 150), (150, 200)):
            oldest = 0 if window is None else max(0, first - window + 1)
            seen = slice(oldest, last)
            pieces.append(
                sliding_window_attention(
                    q_BTHK[:, first:last], k_BSGK[:, seen], v_BSGK[:, seen], window=window, backend=backend
                )
            )
        return torch.cat(pieces, dim=1)

    weights = (random(2, 200, 4, 8, seed=3),)
    whole = functools.partial(sliding_window_attention, window=window, backend=backend)
    expected, expected_gradients = outputs_and_gradients(whole, operands, weights)
    got, gradients = outputs_and_gradients(in_pieces, operands, weights)
    assert_close("out", got[0], expected[0], RATIO[torch.float32])
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", gradients[name], reference, RATIO[torch.float32])


@pytest.mark.parametrize("backend", ["blocked", "numba"])
def test_the_number_of_threads_changes_nothing(backend):
    operands, weights, results = case(2, 150, 150, 8, 4, 16), (random(2, 150, 8, 16, seed=3),), []
    for threads in (1, 3, 20):
        torch.set_num_threads(threads)
        try:
            results.append(
                outputs_and_gradients(
                    functools.partial(sliding_window_attention, window=40, backend=backend), operands, weights
                )
            )
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    for outputs, gradients in results[1:]:
        assert_close("out", outputs[0], results[0][0][0], 1e-6)
        for name, reference in results[0][1].items():
            assert_close(f"gradient of {name}", gradients[name], reference, 1e-6)


# Of scores of some hundreds float32 itself keeps four digits behind the point.
@pytest.mark.parametrize(("scale", "ratio"), [(0.0, 3e-6), (-0.4, 3e-6), (30.0, 5e-4)])
def test_native_loops_take_any_scale_and_scores_that_are_far_apart(scale, ratio):
    operands = case(1, 90, 90, 2, 1, 16)
    operands["q_BTHK"] = 4 * operands["q_BTHK"]
    compare("numba", operands, 30, ratio, scale)


def test_automatic_choice(monkeypatch):
    installed = set()
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package in installed)
    monkeypatch.setattr(fa4, "is_installed", lambda: "flash-attn-4" in installed)
    pick = functools.partial(choose, "sliding_window_attention", "auto")
    assert pick("cpu", **LOCAL) == "blocked"
    assert pick("cpu") == "sdpa"
    assert pick("cpu", **GLOBAL | {"offset_on_cpu": True}) == "blocked"
    installed.add("numba")
    assert pick("cpu", **LOCAL) == pick("cpu", **LOCAL | {"documents": True}) == "numba"
    assert pick("cuda", **LOCAL) == "flex"
    assert pick("cuda") == "sdpa"
    with pytest.raises(BackendUnavailableError, match="pip install flash-attn"):
        choose("sliding_window_attention", "flash", "cuda")
    installed.add("flash_attn")
    assert pick("cuda", **LOCAL) == "flash"
    assert pick("cuda", **LOCAL | {"half_precision": False}) == "flex"
    assert {"naive", "blocked", "flex", "fa4", "flash", "sdpa"} <= set(OPERATIONS["sliding_window_attention"])


@pytest.mark.parametrize(
    ("backend", "shape"), [("naive", SHAPES[2]), ("naive", SHAPES[7]), ("sdpa", (2, 1, 9, 2, 1, 8, 9))]
)
def test_hidden_first_keys_are_as_if_they_were_not_there(backend, shape):
    *sizes, window = shape
    operands = case(*sizes)
    hidden = torch.tensor([(3, 0)[row] for row in range(sizes[0])])
    out = sliding_window_attention(**operands, window=window, hidden_B=hidden, backend=backend)
    for row, count in enumerate(hidden.tolist()):
        cut = {name: value[row : row + 1, count if name != "q_BTHK" else 0 :] for name, value in operands.items()}
        assert_close(
            "out",
            out[row : row + 1],
            sliding_window_attention(**cut, window=window, backend="naive"),
            RATIO[torch.float32],
        )


def test_query_heads_as_rows_of_one_matrix_are_the_same():
    """What a GPU does for one query under a mask."""
    operands = case(3, 1, 11, 6, 2, 8)
    q, k, v = (operands[name].transpose(1, 2) for name in ("q_BTHK", "k_BSGK", "v_BSGK"))
    hidden = torch.tensor([0, 3, 10])
    out = backend_sdpa.one_masked_query(q, k, v, mask_of_rows(1, 11, None, hidden)[:, None], 0.3)
    wanted = sliding_window_attention(**operands, window=None, scale=0.3, hidden_B=hidden, backend="naive")
    assert_close("out", out.transpose(1, 2), wanted, RATIO[torch.float32])


def test_hidden_keys_are_refused_by_name_and_served_by_auto():
    operands, hidden = case(1, 20, 40, 2, 1, 8), torch.tensor([20])
    with pytest.raises(BackendUnavailableError, match="whose first keys are hidden"):
        sliding_window_attention(**operands, window=10, hidden_B=hidden, backend="blocked")
    auto = sliding_window_attention(**operands, window=10, hidden_B=hidden)
    assert_close(
        "out",
        auto,
        sliding_window_attention(**operands, window=10, hidden_B=hidden, backend="naive"),
        RATIO[torch.float32],
    )
    with pytest.raises(ValueError, match="hidden_B must be 1 whole numbers"):
        sliding_window_attention(**operands, window=10, hidden_B=torch.tensor([1, 2]))
