"""The Triton selective scan in the interpreter, against the definition: output, state, every gradient."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.selective_scan.naive import selective_scan_naive

pytestmark = needs_triton
FLOAT32, BFLOAT16 = 2e-6, 8e-3
# name: B, T, E, N, type, what is special. Chunks of two tiles of eight tokens unless it says "one chunk".
SHAPES = {
    "odd sizes, four chunks": (1, 63, 12, 3, torch.float32, ()),
    "one token": (2, 1, 4, 1, torch.float32, ()),
    "whole tiles, two chunks": (1, 32, 64, 1, torch.float32, ()),
    "one chunk": (2, 20, 8, 2, torch.float32, ("one chunk",)),
    "odd chunks": (1, 100, 8, 2, torch.float32, ("odd chunks",)),
    "bfloat16, odd chunks": (1, 100, 8, 1, torch.bfloat16, ("odd chunks",)),
    "no gate, two channel blocks": (1, 18, 70, 1, torch.float32, ("no gate",)),
    "sixteen states": (1, 9, 8, 16, torch.float32, ()),
    "more than sixteen states": (1, 10, 8, 17, torch.float32, ()),
    "large dt A": (1, 33, 16, 3, torch.float32, ("large",)),
    "slices of wider tensors": (2, 9, 8, 2, torch.float32, ("slices",)),
    "only the state is used": (1, 17, 8, 2, torch.float32, ("state only",)),
    "bfloat16": (1, 21, 60, 2, torch.bfloat16, ()),
    "documents": (2, 35, 20, 2, torch.float32, ("documents",)),
    "documents, whole tiles, odd chunks": (1, 104, 64, 1, torch.float32, ("documents", "odd chunks")),
    "documents, one chunk, no gate": (2, 20, 8, 2, torch.float32, ("documents", "one chunk", "no gate")),
    "documents, bfloat16": (2, 21, 60, 1, torch.bfloat16, ("documents",)),
    "B in bfloat16 beside C in float32": (1, 11, 8, 3, torch.float32, ("B and dB in bfloat16",)),
    "bfloat16, no gate": (1, 16, 64, 2, torch.bfloat16, ("no gate",)),
}


def operands(batch, length, channels, states, dtype, special):
    """Random inputs, A negative and steps of 0.1 to 2; "large" makes exp(dt A) underflow for many tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    scale = 40.0 if "large" in special else 1.0
    wide, narrow = (batch, length, channels), (batch, length, states)
    found = {
        "u": normal(*wide).to(dtype),
        "dt": normal(*wide, scale=scale).to(dtype),
        "A": -scale * (0.1 + 4 * torch.rand(channels, states, generator=generator)),
        "B": normal(*narrow).to(dtype),
        "C": normal(*narrow).to(dtype),
        "D": normal(channels),
        "z": normal(*wide, scale=scale).to(dtype),
        "dt_bias": normal(channels) - 1,
        "initial_state": normal(batch, channels, states),
    }
    if "B and dB in bfloat16" in special:
        found["B"] = found["B"].bfloat16()
    gradients = normal(batch, length, channels).to(dtype), normal(batch, channels, states)
    return found, gradients


def documents(batch, length):
    """Document positions that begin at tiles' and chunks' edges, next to each other and, in the second row, at 0."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, [3, 8, 9, 16]] = 1
    ids[1:, [0, length - 1]] = 1
    return document_positions(ids, 1, torch.full((batch,), 5))


def outcome(run, inputs, gradients, special):
    """Output, state and gradients of one implementation."""
    leaves = {}
    for name, x in inputs.items():
        leaf = x.clone().requires_grad_()
        wide = "slices" in special and x.dim() == 3 and name != "initial_state"
        leaves[name] = (leaf, torch.cat([torch.zeros_like(x), leaf], dim=-1)[..., x.size(-1) :] if wide else leaf)
    if "no gate" in special:
        leaves["z"] = (None, None)
    out, state = run(*(used for _, used in leaves.values()))
    wanted = {name: leaf for name, (leaf, _) in leaves.items() if leaf is not None}
    if "state only" in special:
        wanted = {name: wanted[name] for name in ("u", "dt", "A", "B", "dt_bias", "initial_state")}
        found = torch.autograd.grad(state, list(wanted.values()), gradients[1])
    else:
        found = torch.autograd.grad((out, state), list(wanted.values()), gradients)
    return {"out": out.detach(), "state": state.detach()} | {f"d{n}": g for n, g in zip(wanted, found, strict=True)}


def compare(shape):
    """A case: the ratios of everything."""
    from hymba_lightning.ops.selective_scan import triton_launches as module

    module.FORWARD_PROGRAMS, module.BACKWARD_PROGRAMS = (0, 0) if "one chunk" in shape[-1] else (24, 32)
    module.MIN_CHUNK_TILES = 2
    if "odd chunks" in shape[-1]:
        # Three and five tiles in a chunk, of thirteen.
        module.FORWARD_PROGRAMS, module.BACKWARD_PROGRAMS, module.MIN_CHUNK_TILES = 5, 3, 1
    module.multiprocessors = lambda device: 1 if "odd chunks" in shape[-1] else 132

    doc_position = documents(*shape[:2]) if "documents" in shape[-1] else None

    def run_triton(u, dt, A, B, C, D, z, dt_bias, initial_state):
        return module.selective_scan_triton_op(u, dt, A, B, C, D, z, dt_bias, initial_state, doc_position)[:2]

    inputs, gradients = operands(*shape)
    naive = functools.partial(selective_scan_naive, doc_position_BT=doc_position)
    expected = outcome(naive, inputs, gradients, shape[-1])
    return {"ratios": differences(outcome(run_triton, inputs, gradients, shape[-1]), expected)}


def compile_and_check():
    """The operator's registrations, and one graph forward and backward without a break."""
    from hymba_lightning.ops.selective_scan import selective_scan
    from hymba_lightning.ops.selective_scan.triton_launches import selective_scan_triton_op

    inputs, _ = operands(1, 2, 4, 1, torch.float32, ())
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(selective_scan_triton_op, tuple(leaves))
    torch.library.opcheck(selective_scan_triton_op, (*leaves, torch.tensor([[3, 0]], dtype=torch.int32)))

    def loss(u, dt, A, B, C, D, z, dt_bias, initial_state):
        out, state = selective_scan(
            u * 1.0,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias_E=dt_bias,
            initial_state_BEN=initial_state,
            return_state=True,
            backend="triton",
        )
        return out.square().sum() + state.square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    return {"ratios": differences(dict(zip(inputs, found, strict=True)), dict(zip(inputs, expected, strict=True)))}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(results, name):
    rounded = SHAPES[name][4] == torch.bfloat16 or "bfloat16" in name
    assert_within(results[name], BFLOAT16 if rounded else FLOAT32)


@pytest.mark.slow
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], FLOAT32)


def test_a_wrong_gradient_is_seen():
    """The comparison itself: a value changed, a shape changed, an element unwritten."""
    right = {"dA": torch.ones(4), "dB": torch.ones(4), "dC": torch.ones(4), "dD": torch.ones(4)}
    wrong = right | {
        "dA": torch.tensor([1.0, 1.0, 1.0, 1.001]),
        "dB": torch.ones(5),
        "dC": torch.tensor([1.0, 1.0, 1.0, float("nan")]),
    }
    with pytest.raises(AssertionError) as raised:
        assert_within({"ratios": json.loads(json.dumps(differences(wrong, right)))}, FLOAT32)
    assert all(name in str(raised.value) for name in ("dA", "dB", "dC"))
    assert "dD" not in str(raised.value)


if __name__ == "__main__":
    cases = {name: functools.partial(compare, shape) for name, shape in SHAPES.items()}
    run_cases(cases | {"compiled": compile_and_check})
