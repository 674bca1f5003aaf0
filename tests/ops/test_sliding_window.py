"""Every backend of window attention against the dense mask, and the window's edge, key by key."""

import dataclasses
import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from op_cases import NEEDS_GPU, RATIO, on, outputs_and_gradients, random

from hymba_lightning.ops.registry import BackendUnavailableError, backends_of, choose, is_installed
from hymba_lightning.ops.sliding_window import BACKENDS, available_backends, sliding_window_attention
from hymba_lightning.ops.sliding_window import backend_fa4 as fa4
from hymba_lightning.ops.sliding_window import compiled_flex as flex
from hymba_lightning.ops.testing import assert_close

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
]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), on("cpu", "blocked") + on("cuda", "flex", "flash", "fa4"))
def test_backend_matches_naive(backend, shape, dtype, device):
    if backend not in available_backends(device):
        pytest.skip(f"{backend} is not installed")
    *sizes, window = shape
    if backend in ("flash", "fa4") and dtype == torch.float32:
        pytest.skip("flash-attn has no float32")
    if backend == "fa4":
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
@pytest.mark.parametrize("backend", ["naive", "blocked", "flex"])
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


@pytest.mark.parametrize("head_dim", [2, 12, 16, 20])
def test_flex_never_sees_heads_narrower_than_it_compiles_for(head_dim, monkeypatch):
    widths = []

    def attention(q, k, v, **options):
        widths.append({x.size(-1) for x in (q, k, v)})
        return flex.flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: attention)
    operands = case(2, 20, 33, 6, 2, head_dim)
    out = flex.sliding_window_attention_flex(*operands.values(), 9, head_dim**-0.5)
    assert widths == [{max(head_dim, 16)}]
    assert_close("out", out, sliding_window_attention(**operands, window=9, backend="naive"), RATIO[torch.float32])


@pytest.fixture
def traced_flex(monkeypatch):
    """Lists the shapes that torch traces flex_attention for; what it traces is run as it is, without a compiler."""
    shapes = []

    def record(graph, examples):
        shapes.append(tuple(examples[0].shape))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex._attention, dynamic=False, backend=record)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    yield shapes
    torch._dynamo.reset()


def flex_attention_of(n_queries, n_keys, window=20):
    operands = case(1, n_queries, n_keys, 4, 2, 16)
    out = flex.sliding_window_attention_flex(*operands.values(), window, 0.25)
    assert_close("out", out, sliding_window_attention(**operands, window=window, scale=0.25, backend="naive"), 3e-6)


def test_flex_compiles_a_few_shapes_for_many_lengths(traced_flex):
    for n_queries in (100, 129, 150, 160, 180, 192, 200, 250, 256):
        for kept in (0, 5, 18, 19, 60):
            flex_attention_of(n_queries, n_queries + kept)
    assert set(traced_flex) == {(1, 4, length, 16) for length in (128, 192, 256, 384)}
    # Without and with a window's keys before it, and for 192 and 256 once more: keys to which nothing is added are a
    # view with other strides.
    assert len(traced_flex) == 9


def test_flex_compiles_more_shapes_than_torchs_own_limit(traced_flex):
    for window in range(2, 20):
        flex_attention_of(30, 30, window)
    assert len(traced_flex) == 18


def test_flex_refuses_to_make_every_score(traced_flex, monkeypatch):
    monkeypatch.setattr(flex, "MAX_COMPILED_SHAPES", 2)
    flex_attention_of(30, 30, 4)
    flex_attention_of(30, 30, 5)
    with pytest.raises(flex.UncompiledAttentionError, match=r"all 128 x 128 scores.*more than 2 shapes"):
        flex_attention_of(30, 30, 6)
    flex_attention_of(30, 30, 4)
    with torch.compiler.set_stance("force_eager"), pytest.raises(flex.UncompiledAttentionError, match="switched on"):
        flex_attention_of(30, 30, 4)


@pytest.mark.parametrize(
    ("length", "rounded"),
    [
        (1, 128),
        (128, 128),
        (129, 192),
        (192, 192),
        (193, 256),
        (257, 384),
        (385, 512),
        (32768, 32768),
        (32769, 49152),
        (49153, 65536),
    ],
)
def test_lengths_are_rounded_to_two_in_each_doubling(length, rounded):
    assert flex.rounded_length(length) == rounded


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "window"),
    [(30, 30, 9), (30, 33, 9), (30, 38, 9), (30, 50, 9), (1, 9, 9), (1, 4, 9), (140, 200, None)],
)
def test_flex_in_a_rounded_shape_matches_naive(n_queries, n_keys, window, monkeypatch):
    def dense(q, k, v, *, block_mask, scale, enable_gqa, **_):
        t, j = (torch.arange(x.size(2)) for x in (q, k))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=block_mask.mask_mod(0, 0, t[:, None], j), scale=scale, enable_gqa=enable_gqa
        )

    # flex_attention itself has no backward on a CPU.
    monkeypatch.setattr(flex, "_compiled", lambda: dense)
    operands = case(2, n_queries, n_keys, 4, 2, 16)
    weights = (random(2, n_queries, 4, 16, seed=3),)
    got, gradients = outputs_and_gradients(
        lambda **qkv: flex.sliding_window_attention_flex(*qkv.values(), window, 0.25), operands, weights
    )
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(sliding_window_attention, window=window, scale=0.25, backend="naive"), operands, weights
    )
    assert_close("out", got[0], expected[0], 3e-6)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", gradients[name], reference, 3e-6)


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


@pytest.mark.parametrize("backend", ["naive", "blocked"])
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


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "window"),
    [
        (512, 512, 128),
        (700, 700, 200),
        (300, 900, 256),
        (1, 400, 100),
        (640, 640, 640),
        (640, 640, 1),
        (257, 1000, 129),
    ],
)
def test_block_mask_from_its_formula_is_torchs_own(n_queries, n_keys, window):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, t, j):
        distance = t + n_keys - n_queries - j
        return (distance >= 0) & (distance < window)

    def blocks(count, indices):
        return [sorted(row[:number].tolist()) for number, row in zip(count[0, 0], indices[0, 0], strict=True)]

    ours = flex.window_block_mask(n_queries, n_keys, window, torch.device("cpu"))
    torchs = create_block_mask(visible, None, None, n_queries, n_keys, device="cpu")
    assert blocks(ours.kv_num_blocks, ours.kv_indices) == blocks(torchs.kv_num_blocks, torchs.kv_indices)
    full, torchs_full = ((mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (ours, torchs))
    assert blocks(*full) == blocks(*torchs_full)
    assert ours.seq_lengths == (n_queries, n_keys)


def test_block_mask_of_a_long_sequence_is_small():
    mask = flex.window_block_mask(65536, 65536, 512, torch.device("cpu"))
    tensors = (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
    )
    assert sum(x.numel() * x.element_size() for x in tensors) < 8 * 2**20


def test_flash_counts_the_keys_to_the_left_of_the_querys_own(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        calls.append((softmax_scale, causal, window_size))
        return q

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    from hymba_lightning.ops.sliding_window.backend_flash import sliding_window_attention_flash

    operands = case(1, 4, 4, 2, 1, 8)
    sliding_window_attention_flash(*operands.values(), 3, 0.5)
    sliding_window_attention_flash(*operands.values(), None, 0.5)
    assert calls == [(0.5, True, (2, 0)), (0.5, True, (-1, 0))]


@pytest.fixture
def flash_attn_4(monkeypatch):
    """Stands in for the package: its two functions as they are called, computing what its documentation says."""
    calls = []

    def dense(q, k, v, scale, left):
        window = None if left is None else left + 1
        return sliding_window_attention(q, k, v, window=window, scale=scale, backend="naive")

    def forward(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse):
        calls.append((causal, window_size_left, window_size_right, return_lse))
        return (
            dense(q, k, v, softmax_scale, window_size_left),
            torch.zeros(q.size(0), q.size(2), q.size(1)),
            None,
            None,
            None,
        )

    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, window_size_left, window_size_right, deterministic):
        calls.append((causal, window_size_left, window_size_right, deterministic))
        assert out.shape == q.shape
        assert lse.shape == (q.size(0), q.size(2), q.size(1))
        _, pull = torch.func.vjp(lambda *x: dense(*x, softmax_scale, window_size_left), q, k, v)
        return pull(dout)

    names = "flash_attn", "flash_attn.cute", "flash_attn.cute.interface"
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = sys.modules[names[-1]]
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    backends = backends_of("sliding_window_attention")
    monkeypatch.setitem(backends, "fa4", dataclasses.replace(backends["fa4"], check=lambda device_type: None))
    return calls


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("n_keys", [12, 19])
def test_flash_attn_4_behind_an_operator(flash_attn_4, window, n_keys):
    compare("fa4", case(2, 12, n_keys, 4, 2, 64, dtype=torch.bfloat16), window, RATIO[torch.bfloat16], scale=0.5)
    left = None if window is None else window - 1
    assert flash_attn_4 == [(True, left, 0, True), (True, left, 0, False)]


def test_flash_attn_4_in_a_compiled_graph(flash_attn_4):
    operands = case(2, 12, 12, 4, 2, 64, dtype=torch.bfloat16)
    weights = (random(2, 12, 4, 64, seed=3),)
    call = functools.partial(sliding_window_attention, window=5, backend="fa4")
    expected, expected_gradients = outputs_and_gradients(call, operands, weights)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, gradients = outputs_and_gradients(compiled, operands, weights)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in operands)
    arguments = [x.requires_grad_() for x in operands.values()]
    torch.library.opcheck(
        torch.ops.hymba.sliding_window_fa4.default,
        (*arguments, 5, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_flash_attn_4_refuses_what_it_has_no_kernel_for(flash_attn_4):
    with pytest.raises(BackendUnavailableError, match="float16 and bfloat16"):
        sliding_window_attention(**case(1, 4, 4, 2, 1, 64), window=3, backend="fa4")
    for width in (8, 16, 72, 136):
        with pytest.raises(BackendUnavailableError, match="width 64 and 128"):
            sliding_window_attention(**case(1, 4, 4, 2, 1, width, dtype=torch.bfloat16), window=3, backend="fa4")


def test_blocked_does_not_depend_on_the_number_of_threads():
    operands, weights, results = case(2, 150, 150, 8, 4, 16), (random(2, 150, 8, 16, seed=3),), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(
                outputs_and_gradients(
                    functools.partial(sliding_window_attention, window=40, backend="blocked"), operands, weights
                )
            )
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert_close("out", results[1][0][0], results[0][0][0], 1e-6)
    for name, reference in results[0][1].items():
        assert_close(f"gradient of {name}", results[1][1][name], reference, 1e-6)


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


def test_automatic_choice(monkeypatch):
    installed = set()
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package in installed)
    monkeypatch.setattr(fa4, "is_installed", lambda: "flash-attn-4" in installed)
    pick = functools.partial(choose, "sliding_window_attention", "auto")
    assert pick("cpu", **LOCAL) == "blocked"
    assert pick("cpu") == "sdpa"
    assert pick("cpu", **GLOBAL | {"offset_on_cpu": True}) == "blocked"
    assert pick("cuda", **LOCAL) == "flex"
    assert pick("cuda") == "sdpa"
    with pytest.raises(BackendUnavailableError, match="pip install flash-attn"):
        choose("sliding_window_attention", "flash", "cuda")
    installed.add("flash_attn")
    assert pick("cuda", **LOCAL) == "flash"
    assert pick("cuda", **LOCAL | {"half_precision": False}) == "flex"
    assert {"naive", "blocked", "flex", "fa4", "flash", "sdpa"} <= set(BACKENDS)


def test_flash_attn_4_comes_first_on_hopper_and_blackwell(monkeypatch):
    installed, capability = set(), [9, 0]
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: False)
    monkeypatch.setattr(fa4, "is_installed", lambda: "flash-attn-4" in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: tuple(capability))
    pick = functools.partial(choose, "sliding_window_attention", "auto", "cuda")
    with pytest.raises(BackendUnavailableError, match=r"flash-attn-4 is not installed.*hymba-lightning\[hopper\]"):
        choose("sliding_window_attention", "fa4", "cuda")
    installed.add("flash-attn-4")
    assert pick(**LOCAL) == pick() == "fa4"
    assert pick(**LOCAL | {"half_precision": False}) == pick(**LOCAL | {"head_dim": 136}) == "flex"
    capability[0] = 10
    assert pick(**LOCAL) == "fa4"
    capability[0] = 8
    assert pick(**LOCAL) == "flex"
    with pytest.raises(BackendUnavailableError, match="compute capability 9 to 11, this one has 8"):
        choose("sliding_window_attention", "fa4", "cuda")
    with pytest.raises(BackendUnavailableError, match="these are on cpu"):
        choose("sliding_window_attention", "fa4", "cpu")


def test_flash_attn_and_flash_attn_4_are_told_apart(monkeypatch, tmp_path):
    """Both live in a folder flash_attn: the elder as a package, the younger as cute/ in it, with or without it."""
    found = {}
    for name, files in {
        "both": ("__init__.py", "cute/interface.py"),
        "elder": ("__init__.py",),
        "younger": ("cute/interface.py",),
        "none": (),
    }.items():
        for file in files:
            path = tmp_path / name / "flash_attn" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path / name)])
        sys.path_importer_cache.clear()
        found[name] = is_installed.__wrapped__("flash_attn"), fa4.is_installed.__wrapped__()
    assert found == {"both": (True, True), "elder": (True, False), "younger": (False, True), "none": (False, False)}


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
