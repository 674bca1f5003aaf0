"""The Newton-Schulz step against float64, and its Triton kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.ops.newton_schulz import newton_schulz_step
from hymba_lightning.ops.registry import BackendUnavailableError, choose

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# name: n, R, C, type, what is special. Blocks of 32 x 32 and 16 inner elements unless it says "large blocks".
SHAPES = {
    "whole blocks": (2, 96, 128, torch.float32, ()),
    "odd sizes": (3, 45, 67, torch.float32, ()),
    "less than a block": (2, 7, 19, torch.float32, ()),
    "one row": (1, 1, 40, torch.float32, ()),
    "square": (2, 64, 64, torch.float32, ()),
    "a slice of a wider bank": (2, 40, 64, torch.float32, ("slice",)),
    # The interpreter multiplies bfloat16 bit patterns as if they were whole numbers: that type is for a GPU.
    "float16": (2, 96, 128, torch.float16, ()),
    "float16, large blocks": (2, 192, 256, torch.float16, ("large blocks",)),
}
LIMIT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def bank(n, rows, columns, dtype):
    """Matrices of Frobenius norm 1."""
    x_nRC = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return (x_nRC / x_nRC.norm(dim=(1, 2), keepdim=True)).to(dtype)


def definition(x_nRC, a, b, c):
    """The step in float64."""
    x = x_nRC.double()
    gram = x @ x.mT
    return a * x + b * gram @ x + c * gram @ gram @ x


def compare(shape):
    """A case: the ratio of the step, and how far the square products are from symmetric."""
    from hymba_lightning.ops.newton_schulz import triton_launches as module

    n, rows, columns, dtype, special = shape
    module.BLOCK, module.BLOCK_K = (128, 64) if "large blocks" in special else (32, 16)
    x_nRC = bank(n, rows, columns, dtype)
    if "slice" in special:
        x_nRC = torch.cat([x_nRC, x_nRC], dim=2)[:, :, columns:]
    found = module.newton_schulz_step_triton(x_nRC, *COEFFICIENTS)
    gram = module._product(x_nRC.contiguous(), x_nRC.contiguous().mT, None, 1.0, 0.0, symmetric=True)
    whole = module._product(x_nRC.contiguous(), x_nRC.contiguous().mT, None, 1.0, 0.0, symmetric=False)
    expected = {"step": definition(x_nRC, *COEFFICIENTS).to(dtype), "mirrored": whole.mT, "lower": whole}
    return {"ratios": differences({"step": found, "mirrored": gram, "lower": gram}, expected)}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@needs_triton
@pytest.mark.parametrize("case", SHAPES)
def test_triton_step_matches_the_definition(results, case):
    assert_within(results[case], LIMIT[SHAPES[case][3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_step_matches_the_definition(dtype):
    x_nRC = bank(3, 45, 67, dtype)
    found = newton_schulz_step(x_nRC, *COEFFICIENTS)
    assert_within(
        {"ratios": differences({"step": found}, {"step": definition(x_nRC, *COEFFICIENTS).to(dtype)})}, LIMIT[dtype]
    )


def test_choice_and_refusals(monkeypatch):
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: True)
    assert choose("newton_schulz", "auto", "cpu") == "torch"
    assert choose("newton_schulz", "auto", "mps") == "torch"
    assert choose("newton_schulz", "auto", "cuda") == "triton"
    assert choose("newton_schulz", "auto", "cuda", half_precision=False) == "torch"
    with pytest.raises(BackendUnavailableError, match="bfloat16 or float16 matrices"):
        choose("newton_schulz", "triton", "cuda", half_precision=False)
    with pytest.raises(ValueError, match=r"takes a bank \(n, R, C\), not \(3, 4\)"):
        newton_schulz_step(torch.zeros(3, 4), *COEFFICIENTS)


if __name__ == "__main__":
    run_cases({name: lambda shape=shape: compare(shape) for name, shape in SHAPES.items()})
