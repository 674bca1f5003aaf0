"""The chunked state-space dual against the naive loop, and the naive loop against Mamba's scan of one decay a head."""

import functools
import itertools
import math

import pytest
import torch
from op_cases import RATIO, assert_close, on, outputs_and_gradients, random
from torch._dynamo.utils import counters

from hymba_lightning.ops import registry
from hymba_lightning.ops.registry import choose
from hymba_lightning.ops.selective_scan import selective_scan
from hymba_lightning.ops.ssd import backend_chunked, ssd

# (B, T, H, P, G, N): odd sizes, one token, a whole chunk, chunks and a rest, every head a group of its own.
SHAPES = [(2, 63, 6, 10, 2, 5), (1, 1, 2, 8, 1, 8), (2, 64, 3, 16, 1, 1), (1, 150, 4, 5, 4, 3), (2, 67, 4, 32, 2, 16)]


def case(batch, length, heads, channels, groups, states, dtype=torch.float32, device="cpu"):
    """Operands of a call; the time steps after softplus lie around 0.1 and A between -3 and 0."""
    make = functools.partial(random, device=device)
    return {
        "x_BTHP": make(batch, length, heads, channels, dtype=dtype),
        "dt_BTH": make(batch, length, heads, dtype=dtype, seed=1),
        "A_H": -make(heads, seed=9).abs(),
        "B_BTGN": make(batch, length, groups, states, dtype=dtype),
        "C_BTGN": make(batch, length, groups, states, dtype=dtype, seed=1),
        "D_H": make(heads, seed=2),
        "dt_bias_H": make(heads, seed=3) - 2,
        "initial_state_BHPN": make(batch, heads, channels, states),
    }


def weights_of(batch, length, heads, channels, groups, states, device="cpu"):
    return random(batch, length, heads, channels, device=device), random(batch, heads, channels, states, device=device)


def compare(operands, weights, ratio):
    got, got_gradients = outputs_and_gradients(
        functools.partial(ssd, backend="chunked", return_state=True), operands, weights
    )
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(ssd, backend="naive", return_state=True), operands, weights
    )
    for name, actual, reference in zip(("y", "state"), got, expected, strict=True):
        assert_close(name, actual, reference, ratio)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", got_gradients[name], reference, ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "device"), on("cpu", "chunked") + on("cuda", "chunked"))
def test_chunked_matches_naive(name, shape, dtype, device):
    # Products of bfloat16 round what goes into them, weights and states, where the loop rounds its results alone.
    ratio = {torch.float32: RATIO[torch.float32], torch.bfloat16: 3 * RATIO[torch.bfloat16]}[dtype]
    compare(case(*shape, dtype=dtype, device=device), weights_of(*shape, device=device), ratio)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_states_pass_through_groups_of_groups_of_chunks(span, monkeypatch):
    monkeypatch.setattr(backend_chunked, "SPAN", max(span, 2))
    monkeypatch.setattr(backend_chunked, "CHUNK", 4)
    shape = (1, 4 * 2**span + 3, 2, 3, 1, 2)
    compare(case(*shape), weights_of(*shape), RATIO[torch.float32])


def test_with_a_head_of_one_channel_it_is_mambas_scan():
    batch, length, heads, states = 2, 40, 6, 4
    operands = case(batch, length, heads, 1, 1, states)
    y_BTHP, state_BHPN = ssd(**operands, backend="naive", return_state=True)
    scanned, scan_state = selective_scan(
        operands["x_BTHP"][..., 0],
        operands["dt_BTH"],
        operands["A_H"][:, None].expand(heads, states),
        operands["B_BTGN"][:, :, 0],
        operands["C_BTGN"][:, :, 0],
        operands["D_H"],
        None,
        dt_bias_E=operands["dt_bias_H"],
        initial_state_BEN=operands["initial_state_BHPN"][:, :, 0],
        return_state=True,
        backend="naive",
    )
    assert_close("y", y_BTHP[..., 0], scanned, RATIO[torch.float32])
    assert_close("state", state_BHPN[:, :, 0], scan_state, RATIO[torch.float32])


@pytest.mark.parametrize("backend", registry.OPERATIONS["ssd"])
@pytest.mark.parametrize("cuts", [(1,), (64,), (5, 63, 64, 129)], ids=str)
def test_sequence_may_be_cut_anywhere(backend, cuts):
    shape = (2, 131, 4, 5, 2, 3)
    operands, weights, edges = case(*shape), weights_of(*shape), [0, *cuts, 131]

    def in_pieces(initial_state_BHPN, **call):
        pieces, state = [], initial_state_BHPN
        for first, last in itertools.pairwise(edges):
            piece = {key: x[:, first:last] if "_BT" in key else x for key, x in call.items()}
            y, state = ssd(**piece, initial_state_BHPN=state, backend=backend, return_state=True)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    whole = functools.partial(ssd, backend=backend, return_state=True)
    expected, expected_gradients = outputs_and_gradients(whole, operands, weights)
    got, gradients = outputs_and_gradients(in_pieces, operands, weights)
    for actual, reference in zip(got, expected, strict=True):
        assert_close("result", actual, reference, RATIO[torch.float32])
    for key, reference in expected_gradients.items():
        assert_close(f"gradient of {key}", gradients[key], reference, RATIO[torch.float32])


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_steps_and_rates_neither_overflow_nor_vanish_wrongly(size):
    shape = (1, 140, 4, 4, 2, 3)
    operands = case(*shape)
    operands["dt_BTH"] = operands["dt_BTH"] * size
    operands["A_H"] = operands["A_H"] * size
    compare(operands, weights_of(*shape), RATIO[torch.float32])


def test_rounding_does_not_pile_up_over_a_long_sequence():
    shape = (1, 4096, 2, 4, 1, 2)
    operands = case(*shape)
    with torch.no_grad():
        exact, got = (ssd(**operands, backend=backend, return_state=True) for backend in ("naive", "chunked"))
    for actual, reference in zip(got, exact, strict=True):
        assert_close("result", actual, reference, RATIO[torch.float32])


def test_not_a_number_is_not_swallowed():
    operands = case(1, 70, 4, 4, 2, 2)
    operands["x_BTHP"][0, 10, 3] = math.nan
    y = ssd(**operands, backend="chunked")
    assert y[0, 10:, 3].isnan().all()
    assert y[0, :, :3].isfinite().all()


def test_one_compiled_graph_without_breaks_gives_the_same_gradients():
    operands, weights = case(2, 150, 4, 5, 2, 3), weights_of(2, 150, 4, 5, 2, 3)

    def call(**operands):
        return ssd(**operands, return_state=True)

    eager, eager_gradients = outputs_and_gradients(call, operands, weights)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, gradients = outputs_and_gradients(compiled, operands, weights)
    assert counters["stats"]["unique_graphs"] == 1
    for actual, reference in zip([*got, *gradients.values()], [*eager, *eager_gradients.values()], strict=True):
        torch.testing.assert_close(actual, reference)


def test_auto_takes_the_products_and_for_one_generated_token_the_loop(monkeypatch):
    assert choose("ssd", "auto", "cpu") == choose("ssd", "auto", "cuda") == "chunked"
    taken = []
    original = registry.implementation
    monkeypatch.setattr(
        registry, "implementation", lambda op, name, *rest: taken.append(name) or original(op, name, *rest)
    )
    with torch.no_grad():
        ssd(**case(1, 1, 2, 8, 1, 8))
        ssd(**case(1, 2, 2, 8, 1, 8))
    assert taken == ["naive", "auto"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt_BTH": torch.zeros(1, 3, 2)}, r"dt_BTH has shape \(1, 3, 2\), x_BTHP and B_BTGN ask for \(1, 4, 2\)"),
        ({"initial_state_BHPN": torch.zeros(1, 2, 3, 9)}, "initial_state_BHPN has shape"),
        ({"B_BTGN": torch.zeros(1, 4, 3, 2), "C_BTGN": torch.zeros(1, 4, 3, 2)}, "2 heads cannot share B and C in 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(case(1, 4, 2, 3, 1, 2) | changes))
    with pytest.raises(ValueError, match="no backend 'numba'; choose auto or one of naive, chunked"):
        ssd(**case(1, 4, 2, 3, 1, 2), backend="numba")
