"""The Triton causal convolution in the interpreter, against the definition: output, state, every gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.ops.causal_conv1d.naive import causal_conv1d_naive
from hymba_lightning.ops.documents import document_positions

pytestmark = needs_triton
FLOAT32, BFLOAT16 = 2e-6, 8e-3
# name: B, T, E, W, type, activation, what is special
SHAPES = {
    "odd sizes": (2, 63, 60, 4, torch.float32, "silu", ()),
    "several tiles in a program": (1, 70, 6, 3, torch.float32, "silu", ("few programs",)),
    "two channel blocks": (1, 17, 130, 2, torch.float32, "silu", ()),
    "shorter than the state": (2, 3, 5, 8, torch.float32, None, ()),
    "as long as the state": (1, 7, 5, 8, torch.float32, "silu", ()),
    "one tap": (1, 20, 3, 1, torch.float32, "silu", ()),
    "a slice of a wider tensor": (2, 33, 8, 4, torch.float32, "silu", ("slice",)),
    "only the state is used": (1, 20, 4, 4, torch.float32, "silu", ("state only",)),
    "bfloat16": (1, 40, 70, 4, torch.bfloat16, "silu", ()),
    "documents": (2, 63, 20, 4, torch.float32, "silu", ("documents",)),
    "documents, several tiles in a program": (1, 70, 6, 3, torch.float32, None, ("documents", "few programs")),
    "documents shorter than the state": (2, 20, 5, 8, torch.float32, "silu", ("documents",)),
    "documents, bfloat16": (1, 40, 70, 4, torch.bfloat16, "silu", ("documents",)),
}


def documents(batch, length):
    """Document positions that begin at a tile's edge, next to each other and, in the second row, at 0."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, [3, 15, 16]] = 1
    ids[1:, [0, length - 1]] = 1
    return document_positions(ids, 1, torch.full((batch,), 2))


def outcome(run, inputs, gradients, special):
    """Output, state and gradients of one implementation."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    used = dict(leaves)
    if "slice" in special:
        used["x"] = torch.cat([torch.zeros_like(leaves["x"]), leaves["x"]], dim=-1)[..., leaves["x"].size(-1) :]
    out, state = run(*used.values())
    if "state only" in special:
        leaves = {name: leaves[name] for name in ("x", "initial_state")}
        found = torch.autograd.grad(state, list(leaves.values()), gradients[1])
    else:
        found = torch.autograd.grad((out, state), list(leaves.values()), gradients)
    return {"out": out.detach(), "state": state.detach()} | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}


def compare(shape):
    """A case: the ratios of everything."""
    from hymba_lightning.ops.causal_conv1d import triton_launches as module

    batch, length, channels, taps, dtype, activation, special = shape
    module.TARGET_PROGRAMS = 2 if "few programs" in special else 4096
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "x": (batch, length, channels),
        "weight": (channels, taps),
        "bias": (channels,),
        "initial_state": (batch, channels, taps - 1),
    }
    inputs = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    inputs = {name: x.to(dtype) if x.dim() == 3 else x for name, x in inputs.items()}
    gradients = tuple(torch.randn(sizes[name], generator=generator).to(dtype) for name in ("x", "initial_state"))

    doc_position = documents(batch, length) if "documents" in special else None

    def run_triton(x, weight, bias, initial_state):
        return module.causal_conv1d_triton_op(x, weight, bias, activation == "silu", initial_state, doc_position)

    def run_naive(x, weight, bias, initial_state):
        return causal_conv1d_naive(x, weight, bias, activation == "silu", initial_state, doc_position)

    expected = outcome(run_naive, inputs, gradients, special)
    return {"ratios": differences(outcome(run_triton, inputs, gradients, special), expected)}


def compile_and_check():
    """The operator's registrations, and one graph forward and backward without a break."""
    from hymba_lightning.ops.causal_conv1d import causal_conv1d
    from hymba_lightning.ops.causal_conv1d.triton_launches import causal_conv1d_triton_op

    leaves = [torch.randn(*size, requires_grad=True) for size in ((1, 6, 4), (4, 3), (4,), (1, 4, 2))]
    x, weight, bias, state = leaves
    torch.library.opcheck(causal_conv1d_triton_op, (x, weight, bias, True, state))
    positions = torch.arange(6, dtype=torch.int32)[None] % 4
    torch.library.opcheck(causal_conv1d_triton_op, (x, weight, bias, True, state, positions))

    def loss(x, weight, bias, initial_state):
        out, state = causal_conv1d(
            x * 1.0, weight, bias, initial_state_BEW1=initial_state, return_state=True, backend="triton"
        )
        return out.square().sum() + state.square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    names = "x", "weight", "bias", "initial_state"
    return {"ratios": differences(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(results, name):
    assert_within(results[name], BFLOAT16 if SHAPES[name][4] == torch.bfloat16 else FLOAT32)


@pytest.mark.slow
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], FLOAT32)


if __name__ == "__main__":
    cases = {name: functools.partial(compare, shape) for name, shape in SHAPES.items()}
    run_cases(cases | {"compiled": compile_and_check})
