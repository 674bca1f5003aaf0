"""The MLP with the squared leaky ReLU against its definition; its Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.ops.leaky_square_mlp import leaky_square_mlp
from hymba_lightning.ops.registry import BackendUnavailableError, choose

# name: M, D, F, type, what is special. Tiles of 32 x 64, 16 inner elements, 3 programs.
SHAPES = {
    "whole tiles": (64, 32, 128, torch.float32, ()),
    "odd sizes": (45, 24, 72, torch.float32, ()),
    "less than a tile": (5, 8, 16, torch.float32, ()),
    "one tile": (32, 16, 64, torch.float32, ()),
    "a slice of a wider tensor": (40, 16, 64, torch.float32, ("slice",)),
    "a tensor that begins at an odd place": (40, 16, 64, torch.float32, ("shifted",)),
    "a transposed gradient": (40, 16, 64, torch.float32, ("transposed",)),
    "float16": (70, 32, 128, torch.float16, ()),
}
LIMIT = {torch.float32: 2e-6, torch.float16: 3e-3}
SLOPE = 0.3


def operands(tokens, width, hidden, dtype):
    """x, W_in, W_out and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        normal(tokens, width),
        normal(hidden, width) / width**0.5,
        normal(width, hidden) / hidden**0.5,
        normal(tokens, width),
    )


def outcome(run, x, w_in, w_out, gradient):
    """Output and gradients of x and both matrices."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w_in, w_out)]
    out = run(*leaves)
    return dict(
        zip(("out", "dx", "dw_in", "dw_out"), (out.detach(), *torch.autograd.grad(out, leaves, gradient)), strict=True)
    )


def definition(x, w_in, w_out):
    """The MLP in float64, rounded where it ends."""
    hidden = F.leaky_relu(x.double() @ w_in.double().mT, SLOPE)
    return (hidden.square() @ w_out.double().mT).to(x.dtype)


def compare(shape):
    """A case: the ratios of output and gradients."""
    from hymba_lightning.ops.leaky_square_mlp import triton_launches as module

    module.FORWARD = module.BACKWARD = module.Launch((32, 64, 16), 1, True, 4, 2)
    module.multiprocessors = lambda device: 3
    *sizes, dtype, special = shape
    x, w_in, w_out, gradient = operands(*sizes, dtype)
    expected = outcome(definition, x, w_in, w_out, gradient)
    if "slice" in special:
        x = torch.cat([x, x], dim=1)[:, sizes[1] :]
    if "shifted" in special:
        x = torch.cat([x[0, :1], x.flatten()])[1:].view_as(x)
    if "transposed" in special:
        gradient = gradient.T.contiguous().T
    found = outcome(lambda *tensors: leaky_square_mlp_triton(*tensors), x, w_in, w_out, gradient)
    return {"ratios": differences(found, expected)}


def leaky_square_mlp_triton(x, w_in, w_out):
    """The kernels, whatever the type."""
    from hymba_lightning.ops.leaky_square_mlp.triton_launches import LeakySquareMLP

    return LeakySquareMLP.apply(x, w_in, w_out, SLOPE)


def compile_and_check():
    """A case: the compiled MLP against itself, in one graph."""
    x, w_in, w_out, gradient = operands(40, 16, 64, torch.float32)
    compiled = torch.compile(leaky_square_mlp_triton, fullgraph=True, backend="aot_eager")
    return {
        "ratios": differences(
            outcome(compiled, x, w_in, w_out, gradient), outcome(leaky_square_mlp_triton, x, w_in, w_out, gradient)
        )
    }


def no_tokens():
    """A case: a batch without tokens."""
    x, w_in, w_out, gradient = operands(0, 16, 64, torch.float32)
    return {"shapes": [list(x.shape) for x in outcome(leaky_square_mlp_triton, x, w_in, w_out, gradient).values()]}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@needs_triton
@pytest.mark.parametrize("case", SHAPES)
def test_triton_matches_the_definition(results, case):
    assert_within(results[case], LIMIT[SHAPES[case][3]])


@needs_triton
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], LIMIT[torch.float32])


@needs_triton
def test_no_tokens_give_nothing(results):
    assert results["no tokens"]["shapes"] == [[0, 16], [0, 16], [64, 16], [16, 64]]


def test_torch_matches_the_definition():
    x, w_in, w_out, gradient = operands(45, 24, 72, torch.float32)
    found = outcome(lambda *tensors: leaky_square_mlp(*tensors, SLOPE), x, w_in, w_out, gradient)
    assert_within({"ratios": differences(found, outcome(definition, x, w_in, w_out, gradient))}, LIMIT[torch.float32])
    assert leaky_square_mlp(x.view(3, 5, 3, 24), w_in, w_out, SLOPE).shape == (3, 5, 3, 24)


def test_choice_and_refusals(monkeypatch):
    capability = [9]
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability[0], 0))
    assert choose("leaky_square_mlp", "auto", "cpu") == "blocked"
    assert choose("leaky_square_mlp", "auto", "cuda") == "triton"
    assert choose("leaky_square_mlp", "auto", "cuda", half_precision=False, width=64, hidden=64) == "torch"
    assert choose("leaky_square_mlp", "auto", "cuda", half_precision=True, width=64, hidden=60) == "torch"
    capability[0] = 8
    assert choose("leaky_square_mlp", "auto", "cuda") == "torch"
    with pytest.raises(BackendUnavailableError, match="made for Hopper GPUs"):
        choose("leaky_square_mlp", "triton", "cuda")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [7, 100, 101])
def test_blocks_of_tokens_give_the_definition(tokens, threads, monkeypatch):
    monkeypatch.setattr("hymba_lightning.ops.leaky_square_mlp.backend_blocked.BLOCK", 20 * 72)
    *inputs, gradient = operands(tokens, 24, 72, torch.float32)
    expected = outcome(definition, *inputs, gradient)
    torch.set_num_threads(threads)
    try:
        found = outcome(
            lambda x, w_in, w_out: leaky_square_mlp(x[None], w_in, w_out, SLOPE, backend="blocked")[0],
            *inputs,
            gradient,
        )
    finally:
        torch.set_num_threads(1)
    assert_within({"ratios": differences(found, expected)}, LIMIT[torch.float32])


def test_blocks_are_of_float32_on_a_cpu():
    fits = {"half_precision": False, "width": 24, "hidden": 72}
    assert choose("leaky_square_mlp", "auto", "cpu", **fits) == "blocked"
    assert choose("leaky_square_mlp", "auto", "cpu", **fits | {"half_precision": True}) == "torch"


if __name__ == "__main__":
    cases = {name: lambda shape=shape: compare(shape) for name, shape in SHAPES.items()}
    run_cases(cases | {"compiled": compile_and_check, "no tokens": no_tokens})
