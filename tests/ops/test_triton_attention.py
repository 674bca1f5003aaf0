"""The Triton window attention in the interpreter, against the definition: output, sums, every gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_cases import LOCAL, case
from interpreted import assert_within, collect, differences, needs_triton, run_cases
from op_cases import NEEDS_GPU, assert_close, outputs_and_gradients, random

from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.registry import BackendUnavailableError, choose
from hymba_lightning.ops.sliding_window import sliding_window_attention
from hymba_lightning.ops.sliding_window.naive import mask_of_rows, sliding_window_attention_naive

# Of RMS(error) / RMS(reference), by whether operands are of half precision.
LIMIT = {False: 2e-6, True: 3e-3}
# name: B, T, S, H, G, K, window, what is special. Tiles of 32 rows and 16 keys; for keys' gradients of 16 queries.
SHAPES = {
    "whole tiles": (2, 64, 64, 4, 2, 16, 32, ()),
    "odd sizes": (2, 45, 45, 4, 2, 16, 21, ()),
    "shorter than the window": (1, 37, 37, 2, 1, 16, 100, ()),
    "every earlier key": (1, 50, 50, 2, 2, 16, None, ()),
    "own keys and one more": (1, 50, 50, 2, 1, 16, 2, ()),
    "four heads to a kv head": (1, 45, 45, 8, 2, 16, 20, ()),
    "three heads to a kv head": (1, 45, 45, 6, 2, 16, 20, ()),
    "earlier keys": (1, 37, 61, 4, 2, 16, 19, ()),
    "earlier keys that nobody sees": (2, 21, 90, 4, 2, 16, 9, ()),
    "one query": (2, 1, 9, 4, 2, 16, 5, ()),
    "one token": (1, 1, 1, 2, 1, 16, 4, ()),
    "tiles of more keys than queries": (1, 45, 45, 4, 2, 16, 30, ("wide keys",)),
    "slices of a wider tensor": (2, 45, 45, 4, 2, 16, 20, ("slice",)),
    "slices at an odd place": (2, 45, 45, 4, 2, 16, 20, ("shifted",)),
    "gradient of a transposed output": (2, 45, 45, 4, 2, 16, 20, ("transposed",)),
    "large scores": (1, 45, 45, 4, 2, 16, 20, ("large",)),
    "negative scale": (1, 45, 45, 4, 2, 16, 20, ("negative",)),
    "no scale": (1, 45, 45, 4, 2, 16, 20, ("zero",)),
    "documents": (2, 61, 61, 4, 2, 16, 23, ("documents",)),
    "documents, every earlier key": (2, 61, 61, 4, 2, 16, None, ("documents",)),
    "documents after earlier keys": (2, 40, 70, 4, 2, 16, 23, ("documents",)),
    "float16": (2, 45, 45, 4, 2, 16, 20, ("half",)),
}
NOTHING = ((2, 0), (0, 5))


def documents(batch, length):
    """Document positions that begin at a tile's edge, next to each other and, in the second row, at 0."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, [3, 15, 16, 32]] = 1
    ids[1:, [0, length - 1]] = 1
    return document_positions(ids, 1, torch.full((batch,), 2))


def outcome(run, leaves, gradient, special):
    """Output and gradients of q, k and v, these being what `special` makes of the leaves."""
    used = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    q, k, v = used.values()
    if "slice" in special or "shifted" in special:
        before = 1 if "shifted" in special else 16
        q, k, v = (
            torch.cat([x.new_zeros(*x.shape[:2], before), x.flatten(2)], dim=2)[..., before:].unflatten(2, x.shape[2:])
            for x in (q, k, v)
        )
    out = run(q, k, v)
    found = torch.autograd.grad(out, list(used.values()), gradient)
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(used, found, strict=True)}


def setup(shape):
    """The launches' module with small tiles, leaves, the gradient of the output, document positions, the scale."""
    from hymba_lightning.ops.sliding_window import triton_launches as module

    batch, n_queries, n_keys, heads, kv_heads, width, _, special = shape
    tile = module.Launch(32, 64 if "wide keys" in special else 16, 4, 2)
    module.LAUNCHES = {width: module.Launches(tile, tile, tile._replace(rows=16))}
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "q": (batch, n_queries, heads, width),
        "k": (batch, n_keys, kv_heads, width),
        "v": (batch, n_keys, kv_heads, width),
    }
    dtype = torch.float16 if "half" in special else torch.float32
    leaves = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    gradient = torch.randn(sizes["q"], generator=generator).to(dtype)
    if "transposed" in special:
        gradient = gradient.transpose(1, 3).contiguous().transpose(1, 3)
    doc_position = documents(batch, n_queries) if "documents" in special else None
    scales = {"large": 40.0, "negative": -0.4, "zero": 0.0}
    return module, leaves, gradient, doc_position, next((scales[name] for name in special if name in scales), 0.3)


def compare(shape):
    """A case: the ratios of output and gradients."""
    module, leaves, gradient, doc_position, scale = setup(shape)
    *_, window, special = shape
    call = {"window": window, "scale": scale, "doc_position_BT": doc_position}
    found, expected = (
        outcome(functools.partial(run, **call), leaves, gradient, special)
        for run in (module.sliding_window_attention_triton, sliding_window_attention_naive)
    )
    if "zero" in special:
        # Weights do not depend on q and k then.
        found, expected = ({name: x[name] for name in ("out", "dv")} for x in (found, expected))
    return {"ratios": differences(found, expected)}


def own_key_alone():
    """A case: a window of 1, where weights are constant; the largest entry of their gradients."""
    module, leaves, gradient, _, scale = setup((2, 45, 45, 4, 2, 16, 1, ()))
    found = outcome(lambda *qkv: module.sliding_window_attention_triton(*qkv, 1, scale), leaves, gradient, ())
    values = leaves["v"].repeat_interleave(2, dim=2)
    return {
        "ratios": differences({"out": found["out"]}, {"out": values}),
        "largest": [found[name].abs().max().item() for name in ("dq", "dk")],
    }


def sums():
    """A case: log Σ exp of the scores, what the operator returns beside the output."""
    module, leaves, *_, scale = setup((2, 45, 60, 4, 2, 16, 20, ()))
    q, k, v = leaves.values()
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, dim=2)) * scale
    seen = mask_of_rows(45, 60, 20, torch.zeros(2, dtype=torch.int64))[:, None]
    expected = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    return {"ratios": differences({"log_sums": module._attention(q, k, v, 20, scale, None)[1]}, {"log_sums": expected})}


def compile_and_check():
    """A case: the operator's registrations, and one graph forward and backward without a break."""
    module, leaves, gradient, doc_position, scale = setup((1, 33, 33, 2, 1, 16, 9, ("documents",)))
    q, k, v = (x.requires_grad_() for x in leaves.values())
    torch.library.opcheck(module._attention, (q, k, v, 9, scale, None))
    torch.library.opcheck(module._attention, (q, k, v, 9, scale, doc_position))

    def attention(q, k, v):
        return module.sliding_window_attention_triton(q * 1.0, k, v, 9, scale)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    return {
        "ratios": differences(outcome(compiled, leaves, gradient, ()), outcome(attention, leaves, gradient, ())),
    }


def nothing(batch, length):
    """A case: no tokens, or no sequences."""
    module, leaves, gradient, _, scale = setup((batch, length, length, 4, 2, 16, 20, ()))
    found = outcome(lambda *qkv: module.sliding_window_attention_triton(*qkv, 20, scale), leaves, gradient, ())
    return {"shapes": [list(x.shape) for x in found.values()]}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(results, name):
    special = SHAPES[name][-1]
    # Scores of several hundred are themselves known to some 2e-5.
    assert_within(results[name], 2e-5 if "large" in special else LIMIT["half" in special])


@needs_triton
@pytest.mark.slow
def test_a_query_that_sees_itself_alone_gets_its_value(results):
    assert_within(results["own key alone"], LIMIT[False])
    assert max(results["own key alone"]["largest"]) < 1e-5


@needs_triton
@pytest.mark.slow
def test_sums_are_those_of_the_scores(results):
    assert_within(results["sums"], LIMIT[False])


@needs_triton
@pytest.mark.slow
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], LIMIT[False])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), NOTHING)
def test_no_tokens_give_nothing(results, batch, length):
    q, kv = [batch, length, 4, 16], [batch, length, 2, 16]
    assert results[f"nothing, {batch} x {length}"]["shapes"] == [q, q, kv, kv]


@needs_triton
def test_heads_are_read_where_they_are_unless_no_tile_could_be():
    from hymba_lightning.ops.sliding_window.triton_launches import _readable

    wide = torch.zeros(2, 10, 5 * 16, dtype=torch.bfloat16)
    for x in (wide[..., 32:64].unflatten(2, (2, 16)), wide[:, 3:, 8:40].unflatten(2, (2, 16))):
        assert _readable(x) is x
    for x in (
        wide[..., 4:36].unflatten(2, (2, 16)),
        wide.unflatten(2, (5, 16))[:, :, ::2],
        wide.unflatten(2, (5, 16)).transpose(1, 2),
        wide[:1].unflatten(2, (5, 16)).expand(2, -1, -1, -1),
        wide[:, :1].unflatten(2, (5, 16)).expand(-1, 10, -1, -1),
    ):
        assert _readable(x).is_contiguous()
        assert torch.equal(_readable(x), x)


def test_it_is_the_first_choice_on_a_hopper_for_what_it_serves(monkeypatch):
    capability = [9]
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package == "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability[0], 0))
    pick = functools.partial(choose, "sliding_window_attention")
    for name in ("auto", "triton"):
        assert pick(name, "cuda", **LOCAL) == pick(name, "cuda", **LOCAL | {"documents": True}) == "triton"
    for change, reason in (
        ({"half_precision": False}, "bfloat16 or float16"),
        ({"head_dim": 32}, "width 64 and 128"),
        ({"hidden": True}, "first keys are hidden"),
    ):
        with pytest.raises(BackendUnavailableError, match=reason):
            pick("triton", "cuda", **LOCAL | change)
        assert pick("auto", "cuda", **LOCAL | change) != "triton"
    capability[0] = 10
    with pytest.raises(BackendUnavailableError, match="made for Hopper GPUs"):
        pick("triton", "cuda")


@pytest.mark.parametrize("width", [pytest.param(width, marks=NEEDS_GPU) for width in (64, 128)])
@pytest.mark.parametrize("earlier", [0, 150])
def test_documents_on_a_gpu(width, earlier):
    operands = case(2, 700, 700 + earlier, 8, 4, width, torch.bfloat16, "cuda")
    attention = functools.partial(sliding_window_attention, window=200, doc_position_BT=documents(2, 700).cuda())
    weights = (random(2, 700, 8, width, device="cuda", seed=3),)
    got, expected = (
        outputs_and_gradients(functools.partial(attention, backend=backend), operands, weights)
        for backend in ("triton", "naive")
    )
    assert_close("out", got[0][0], expected[0][0], 1e-2)
    for name, reference in expected[1].items():
        assert_close(f"gradient of {name}", got[1][name], reference, 1e-2)


@pytest.mark.parametrize("window", [pytest.param(window, marks=NEEDS_GPU) for window in (200, None)])
def test_a_compiled_step_is_replayed_from_a_cuda_graph(window):
    operands = [x.requires_grad_() for x in case(2, 700, 700, 8, 4, 64, torch.bfloat16, "cuda").values()]
    weight = random(2, 700, 8, 64, device="cuda", seed=3)

    def loss(q, k, v, backend):
        return (sliding_window_attention(q * 1.0, k, v, window=window, backend=backend).float() * weight).sum()

    compiled = torch.compile(functools.partial(loss, backend="triton"), dynamic=False)

    def step(*qkv):
        return torch.autograd.grad(compiled(*qkv), qkv)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*operands)
    for _ in range(2):
        with torch.no_grad():
            for x in operands:
                x.copy_(x.roll(1, dims=1))
        graph.replay()
        expected = torch.autograd.grad(loss(*operands, backend="naive"), operands)
        for got, reference in zip(found, expected, strict=True):
            assert_close("gradient", got, reference, 1e-2)


if __name__ == "__main__":
    cases = {name: functools.partial(compare, shape) for name, shape in SHAPES.items()}
    cases |= {f"nothing, {batch} x {length}": functools.partial(nothing, batch, length) for batch, length in NOTHING}
    run_cases(cases | {"own key alone": own_key_alone, "sums": sums, "compiled": compile_and_check})
