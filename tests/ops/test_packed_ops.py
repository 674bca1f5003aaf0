"""Documents packed into one sequence: every op and backend against each document by itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from document_cases import BATCH, BOS, EARLIER, LENGTH, STARTS, assert_same, attention_operands, positions
from op_cases import NEEDS_GPU, RATIO, assert_close, outputs_and_gradients, random

from hymba_lightning.ops.causal_conv1d import causal_conv1d
from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose
from hymba_lightning.ops.selective_scan import backend_chunked as chunked_scan
from hymba_lightning.ops.selective_scan import selective_scan
from hymba_lightning.ops.sliding_window import backend_blocked, sliding_window_attention
from hymba_lightning.ops.ssd import backend_chunked as chunked_ssd
from hymba_lightning.ops.ssd import ssd


def scan_operands(make, narrow, length=LENGTH):
    return {
        "u_BTE": narrow(BATCH, length, 20),
        "dt_BTE": narrow(BATCH, length, 20, seed=1),
        "A_EN": -make(20, 3).abs(),
        "B_BTN": narrow(BATCH, length, 3),
        "C_BTN": narrow(BATCH, length, 3, seed=1),
        "D_E": make(20),
        "z_BTE": narrow(BATCH, length, 20, seed=2),
        "dt_bias_E": make(20, seed=3) - 2,
        "initial_state_BEN": make(BATCH, 20, 3),
    }


def conv_operands(make, narrow, length=LENGTH):
    return {
        "x_BTE": narrow(BATCH, length, 20),
        "weight_EW": make(20, 4),
        "bias_E": make(20),
        "initial_state_BEW1": narrow(BATCH, 20, 3),
    }


def ssd_operands(make, narrow, length=LENGTH):
    return {
        "x_BTHP": narrow(BATCH, length, 4, 5),
        "dt_BTH": narrow(BATCH, length, 4, seed=1),
        "A_H": -make(4, seed=9).abs(),
        "B_BTGN": narrow(BATCH, length, 2, 3),
        "C_BTGN": narrow(BATCH, length, 2, 3, seed=1),
        "D_H": make(4, seed=2),
        "dt_bias_H": make(4, seed=3) - 2,
        "initial_state_BHPN": make(BATCH, 4, 5, 3),
    }


def attend(q_BTHK, k_BTGK, v_BTGK, *, window, doc_position_BT=None, return_state=True, backend):
    """Attention as an op of a sequence, without keys of before."""
    return sliding_window_attention(
        q_BTHK, k_BTGK, v_BTGK, window=window, doc_position_BT=doc_position_BT, backend=backend
    )


@dataclass(frozen=True)
class Op:
    call: Callable
    make: Callable
    cpu: tuple[str, ...]
    gpu: tuple[str, ...]

    def operands(self, dtype=torch.float32, device="cpu"):
        """Of `dtype` what a network has in its compute dtype, float32 the rest."""
        make = functools.partial(random, device=device)
        return self.make(make, functools.partial(make, dtype=dtype))

    def state_name(self):
        return next((name for name in self.operands() if name.startswith("initial_state")), None)


OPS = {
    "scan": Op(
        selective_scan, scan_operands, ("chunked", "segments", "numba", "doubling"), ("triton", "chunked", "doubling")
    ),
    "conv": Op(causal_conv1d, conv_operands, ("torch", "numba"), ("triton", "torch")),
    "ssd": Op(ssd, ssd_operands, ("chunked", "small chunks"), ("chunked",)),
    "window 20": Op(functools.partial(attend, window=20), attention_operands, ("blocked", "numba"), ("flex",)),
    "all keys": Op(functools.partial(attend, window=None), attention_operands, ("blocked", "numba"), ("flex",)),
}
ON_CPU = [pytest.param(name, backend, id=f"{name}-{backend}") for name, op in OPS.items() for backend in op.cpu]
WITH_NAIVE = ON_CPU + [pytest.param(name, "naive", id=f"{name}-naive") for name in OPS]
ON_GPU = [
    pytest.param(name, backend, "cuda", marks=NEEDS_GPU, id=f"{name}-{backend}-cuda")
    for name, op in OPS.items()
    for backend in op.gpu
]


@pytest.fixture
def usable(monkeypatch):
    """Turns a name into the backend argument: some stand for a backend with other constants."""

    def backend(name):
        if name == "segments":
            monkeypatch.setattr(chunked_scan, "chunks_per_segment", lambda length, device_type: 1)
        if name == "small chunks":
            monkeypatch.setattr(chunked_ssd, "CHUNK", 4)
            monkeypatch.setattr(chunked_ssd, "SPAN", 3)
        monkeypatch.setattr(backend_blocked, "BLOCK", 32)
        return "chunked" if name in ("segments", "small chunks") else name

    return backend


def of_tokens(name):
    return "_BT" in name


def weights_of(outputs):
    return [random(*out.shape, seed=7).to(out.device) for out in outputs]


def results(op, backend, operands, **options):
    call = functools.partial(op.call, return_state=True, backend=backend, **options)
    with torch.no_grad():
        outputs = call(**operands)
    return outputs_and_gradients(call, operands, weights_of(outputs if isinstance(outputs, tuple) else (outputs,)))


def test_positions_are_counted_from_the_latest_start():
    ids = torch.full((BATCH, LENGTH), 5)
    for row, starts in enumerate(STARTS):
        ids[row, starts] = BOS
    expected = positions()
    assert torch.equal(document_positions(ids, BOS, torch.tensor(EARLIER)), expected)
    assert torch.equal(document_positions(ids[:1], BOS), expected[:1]), "row 0 begins with a start"
    assert document_positions(ids[1:], BOS)[0, :41].tolist() == [*range(40), 0]
    pieces, earlier = [], torch.tensor(EARLIER)
    for first, last in itertools.pairwise([0, 1, 40, 41, 130, 131]):
        pieces.append(document_positions(ids[:, first:last], BOS, earlier))
        earlier = pieces[-1][:, -1] + 1
    assert torch.equal(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "backend", "device"), [pytest.param(*case.values, "cpu", id=case.id) for case in ON_CPU] + ON_GPU
)
def test_backend_matches_naive(name, backend, device, dtype, usable):
    op, doc_position_BT = OPS[name], positions(device)
    operands = op.operands(dtype, device)
    ratio = {torch.float32: RATIO[torch.float32], torch.bfloat16: 3 * RATIO[torch.bfloat16]}[dtype]
    if device == "cuda":
        ratio = {torch.float32: 2e-3 if backend == "flex" else 2e-5, torch.bfloat16: 2e-2}[dtype]
    got = results(op, usable(backend), operands, doc_position_BT=doc_position_BT)
    assert_same(got, results(op, "naive", operands, doc_position_BT=doc_position_BT), ratio)


@pytest.mark.parametrize(("name", "backend"), WITH_NAIVE)
def test_documents_together_are_as_one_by_one(name, backend, usable):
    op = OPS[name]
    operands, state_name, backend = op.operands(), op.state_name(), usable(backend)

    def one_by_one(**leaves):
        rows, states = [], []
        for row, starts in enumerate(STARTS):
            outs = []
            for first, last in itertools.pairwise(sorted({0, *starts, LENGTH})):
                piece = {
                    key: x[row : row + 1, first:last] if of_tokens(key) else x
                    for key, x in leaves.items()
                    if key != state_name
                }
                if state_name is not None and first == 0 and 0 not in starts:
                    piece[state_name] = leaves[state_name][row : row + 1]
                if name == "conv" and first == 0 and 0 not in starts:
                    # Of the state's three inputs two are of this document.
                    kept = (torch.arange(3) >= 3 - EARLIER[row]).float()
                    piece[state_name] = piece[state_name] * kept
                found = op.call(**piece, return_state=True, backend=backend)
                out, state = found if isinstance(found, tuple) else (found, None)
                outs.append(out)
            rows.append(torch.cat(outs, dim=1))
            states.append(state)
        if state_name is None:
            return torch.cat(rows)
        if name == "conv":
            # The last inputs, whichever document they are of.
            return torch.cat(rows), leaves["x_BTE"][:, -3:].transpose(1, 2)
        return torch.cat(rows), torch.cat(states)

    with torch.no_grad():
        outputs = one_by_one(**operands)
    weights = weights_of(outputs if isinstance(outputs, tuple) else (outputs,))
    expected = outputs_and_gradients(one_by_one, operands, weights)
    call = functools.partial(op.call, doc_position_BT=positions(), return_state=True, backend=backend)
    assert_same(outputs_and_gradients(call, operands, weights), expected, RATIO[torch.float32])


@pytest.mark.parametrize(
    ("name", "backend", "device"), [pytest.param(*case.values, "cpu", id=case.id) for case in WITH_NAIVE] + ON_GPU
)
def test_nothing_leaks_into_the_next_document(name, backend, device, usable):
    """Not by a single bit: neither what earlier documents were, however large, nor gradients to them."""
    op, starts = OPS[name], [(60, 90), (40, 66)]
    ids = torch.full((BATCH, LENGTH), 5)
    for row, (first, last) in enumerate(starts):
        ids[row, [first, last]] = BOS
    doc_position_BT, backend = document_positions(ids, BOS).to(device), usable(backend)
    inside = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=device)
    for row, (first, last) in enumerate(starts):
        inside[row, first:last] = True
    state_name = op.state_name()
    operands = op.operands(device=device)
    leaves = {key: x.clone().requires_grad_() for key, x in operands.items()}

    def outputs(leaves):
        out = op.call(**leaves, doc_position_BT=doc_position_BT, return_state=True, backend=backend)
        return (out[0] if isinstance(out, tuple) else out)[inside]

    out = outputs(leaves)
    out.square().sum().backward()
    other = {
        key: torch.where(inside.view(BATCH, LENGTH, *[1] * (x.dim() - 2)), x, 1e8 * x) if of_tokens(key) else x
        for key, x in operands.items()
    }
    if state_name is not None:
        other[state_name] = operands[state_name] + 5
        assert not leaves[state_name].grad.any()
    assert torch.equal(outputs(other), out)
    for key, x in leaves.items():
        if of_tokens(key):
            assert not x.grad[~inside].any(), key
            assert x.grad[inside].any(), key


@pytest.mark.parametrize(("name", "backend"), [case.values for case in WITH_NAIVE if case.values[0] in OPS])
@pytest.mark.parametrize("cuts", [(1,), (64, 65), (3, 5, 39, 90, 130)], ids=str)
def test_a_sequence_of_documents_may_be_cut_anywhere(name, backend, cuts, usable):
    op, doc_position_BT = OPS[name], positions()
    operands, state_name, backend = op.operands(), op.state_name(), usable(backend)

    def in_pieces(**leaves):
        outs, state = [], None if state_name is None else leaves.pop(state_name)
        for first, last in itertools.pairwise([0, *cuts, LENGTH]):
            here = {"doc_position_BT": doc_position_BT[:, first:last], "backend": backend}
            if state_name is None:
                window = op.call.keywords["window"]
                seen = slice(0 if window is None else max(0, first - window + 1), last)
                q_BTHK, k_BTGK, v_BTGK = leaves.values()
                outs.append(
                    sliding_window_attention(
                        q_BTHK[:, first:last], k_BTGK[:, seen], v_BTGK[:, seen], window=window, **here
                    )
                )
            else:
                piece = {key: x[:, first:last] if of_tokens(key) else x for key, x in leaves.items()}
                out, state = op.call(**piece, **here, **{state_name: state}, return_state=True)
                outs.append(out)
        return torch.cat(outs, dim=1) if state_name is None else (torch.cat(outs, dim=1), state)

    whole = functools.partial(op.call, doc_position_BT=doc_position_BT, return_state=True, backend=backend)
    with torch.no_grad():
        outputs = whole(**operands)
    weights = weights_of(outputs if isinstance(outputs, tuple) else (outputs,))
    expected = outputs_and_gradients(whole, operands, weights)
    assert_same(outputs_and_gradients(in_pieces, operands, weights), expected, RATIO[torch.float32])


@pytest.mark.parametrize(("name", "backend"), WITH_NAIVE)
def test_one_document_is_what_there_is_without_positions(name, backend, usable):
    op = OPS[name]
    operands, backend = op.operands(), usable(backend)
    one = torch.arange(50, 50 + LENGTH, dtype=torch.int32).expand(BATCH, -1)
    ratio = 1e-6 if name == "ssd" else 0
    assert_same(results(op, backend, operands, doc_position_BT=one), results(op, backend, operands), ratio)


def test_blocked_attention_leaves_out_the_keys_of_earlier_documents(monkeypatch):
    """What it does not look at costs nothing: short documents are cheaper than a long one."""
    monkeypatch.setattr(backend_blocked, "BLOCK", 32)
    operands = attention_operands(random, random)
    ids = torch.full((BATCH, LENGTH), 5)
    ids[:, ::32] = BOS
    widths = []
    original = backend_blocked._Problem.probabilities

    def probabilities(self, q_GRK, k_GSK, block, *rest):
        widths.append(k_GSK.size(1))
        return original(self, q_GRK, k_GSK, block, *rest)

    monkeypatch.setattr(backend_blocked._Problem, "probabilities", probabilities)
    sliding_window_attention(
        *operands.values(), window=None, doc_position_BT=document_positions(ids, BOS), backend="blocked"
    )
    assert set(widths) == {32, LENGTH % 32}


def test_attention_of_one_query_sees_its_own_document():
    operands = {"q_BTHK": random(2, 1, 4, 8), "k_BSGK": random(2, 40, 2, 8), "v_BSGK": random(2, 40, 2, 8, seed=2)}
    position = torch.tensor([[0], [12]], dtype=torch.int32)
    out = sliding_window_attention(**operands, window=None, doc_position_BT=position, backend="sdpa")
    torch.testing.assert_close(out[0, 0], operands["v_BSGK"][0, -1].repeat_interleave(2, dim=0))
    naive = sliding_window_attention(**operands, window=None, doc_position_BT=position, backend="naive")
    assert_close("out", out, naive, RATIO[torch.float32])


REFUSALS = {
    ("selective_scan", "mamba_ssm"): {"initial_state": False, "state_gradient": False},
    ("causal_conv1d", "causal_conv1d"): {"taps": 4, "channels": 8},
    **{
        ("sliding_window_attention", name): {
            "windowed": False,
            "hidden": False,
            "one_query": False,
            "offset_on_cpu": False,
            "half_precision": True,
            "head_dim": 64,
        }
        for name in ("fa4", "flash", "sdpa")
    },
}


@pytest.mark.parametrize(("op", "backend"), REFUSALS)
def test_a_backend_that_knows_no_documents_says_so_by_name(op, backend, monkeypatch):
    for entry in OPERATIONS[op].values():
        monkeypatch.setattr(type(entry), "missing", lambda self, device_type: None)
    call = REFUSALS[op, backend]
    assert choose(op, backend, "cuda", **call, documents=False) == backend
    with pytest.raises(BackendUnavailableError, match=rf"{op}: backend '{backend}' cannot serve this call: .*document"):
        choose(op, backend, "cuda", **call, documents=True)
    assert choose(op, "auto", "cuda", **call, documents=True) in ("triton", "flex")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "wrong", [torch.zeros(BATCH, LENGTH), torch.zeros(BATCH, LENGTH - 1, dtype=torch.int32)], ids=str
)
def test_positions_that_do_not_fit_are_named(name, wrong):
    with pytest.raises(ValueError, match=rf"doc_position_BT must be int32 \({BATCH}, {LENGTH}\), not {wrong.dtype}"):
        OPS[name].call(**OPS[name].operands(), doc_position_BT=wrong, backend="naive")
