"""The Triton softcapped cross-entropy in the interpreter, against the definition: loss and gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.ops.softcapped_cross_entropy.naive import softcapped_cross_entropy_naive

pytestmark = needs_triton
FLOAT32, BFLOAT16 = 2e-6, 8e-3
# name: N, V, size of the logits, cap, type, what is special. Blocks of 64 logits unless it says "one block".
SHAPES = {
    "odd sizes": (17, 60, 3, 30.0, torch.float32, ()),
    "several blocks": (5, 257, 3, 30.0, torch.float32, ()),
    "whole blocks": (5, 256, 3, 30.0, torch.float32, ()),
    "one block": (3, 1023, 3, 30.0, torch.float32, ("one block",)),
    "one id": (4, 1, 3, 30.0, torch.float32, ()),
    "far over the cap": (7, 130, 300, 30.0, torch.float32, ()),
    "largest numbers": (7, 130, 1e30, 30.0, torch.float32, ()),
    "cap out of reach": (7, 130, 60, 500.0, torch.float32, ()),
    "a slice of a wider tensor": (6, 70, 3, 30.0, torch.float32, ("slice",)),
    "bfloat16": (9, 200, 3, 30.0, torch.bfloat16, ()),
    "bfloat16, far over the cap": (9, 200, 300, 15.0, torch.bfloat16, ()),
}


def operands(tokens, vocab, size, dtype):
    """Logits, targets and the gradient of the loss."""
    generator = torch.Generator().manual_seed(0)
    return (
        (size * torch.randn(tokens, vocab, generator=generator)).to(dtype),
        torch.randint(0, vocab, (tokens,), generator=generator),
        torch.randn(tokens, generator=generator),
    )


def compare(shape):
    """A case: the ratios of loss and gradient."""
    from hymba_lightning.ops.softcapped_cross_entropy import triton_launches as module

    tokens, vocab, size, cap, dtype, special = shape
    module.BLOCK_V = 1024 if "one block" in special else 64
    logits, targets, gradient = operands(tokens, vocab, size, dtype)

    def outcome(run):
        leaf = logits.clone().requires_grad_()
        nats, _ = run(torch.cat([leaf, leaf], dim=1)[:, vocab:] if "slice" in special else leaf, targets, cap)
        return {"nats": nats.detach(), "dlogits": torch.autograd.grad(nats, leaf, gradient)[0]}

    expected = outcome(softcapped_cross_entropy_naive)
    found = outcome(module.softcapped_cross_entropy_triton)
    return {"ratios": differences(found, expected)}


def wrong_targets():
    """Losses of three targets of which the first and the last are no ids."""
    from hymba_lightning.ops.softcapped_cross_entropy.triton_launches import softcapped_cross_entropy_triton

    nats, _ = softcapped_cross_entropy_triton(torch.zeros(3, 10), torch.tensor([-1, 4, 10]), 30.0)
    return {"finite": nats.isfinite().tolist()}


def compile_and_check():
    """The operator's registrations, and one graph forward and backward without a break."""
    from hymba_lightning.ops.softcapped_cross_entropy.triton_launches import softcapped_cross_entropy_triton

    logits, targets, _ = operands(6, 20, 3, torch.float32)
    logits.requires_grad_()
    torch.library.opcheck(softcapped_cross_entropy_triton, (logits, targets, 30.0))

    def loss(logits):
        return softcapped_cross_entropy_triton(logits * 1.0, targets, 30.0)[0].square().sum()

    expected = torch.autograd.grad(loss(logits), logits)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits), logits)
    return {"ratios": differences({"dlogits": found[0]}, {"dlogits": expected[0]})}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(results, name):
    assert_within(results[name], BFLOAT16 if SHAPES[name][4] == torch.bfloat16 else FLOAT32)
    assert results[name]["ratios"]["nats"] <= FLOAT32


@pytest.mark.slow
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], FLOAT32)


@pytest.mark.slow
def test_targets_that_are_no_ids_give_no_number(results):
    assert results["wrong targets"]["finite"] == [False, True, False]


if __name__ == "__main__":
    cases = {name: functools.partial(compare, shape) for name, shape in SHAPES.items()}
    run_cases(cases | {"wrong targets": wrong_targets, "compiled": compile_and_check})
