"""Triton's norm and turn of heads in the interpreter, against torch's operators: output and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.model.attention import rope_table
from hymba_lightning.ops.registry import BackendUnavailableError
from hymba_lightning.ops.rotary_norm import rotary_norm
from hymba_lightning.ops.rotary_norm.backend_torch import RotaryNorm

pytestmark = needs_triton
FLOAT32, BFLOAT16 = 2e-6, 8e-3
# name: B, T, H, K, type, with a gain, what is special
SHAPES = {
    "a block of tokens that is not full": (2, 45, 3, 32, torch.float32, True, ()),
    "several blocks in a program": (2, 99, 3, 32, torch.float32, True, ("few programs",)),
    "one token": (1, 1, 2, 64, torch.float32, True, ()),
    "without a gain": (1, 40, 2, 32, torch.float32, False, ()),
    "wide heads": (1, 33, 1, 128, torch.float32, True, ()),
    "a slice of a wider tensor": (2, 33, 2, 32, torch.float32, True, ("slice",)),
    "heads that lie apart": (2, 33, 2, 32, torch.float32, True, ("apart",)),
    "a gradient that is one number": (1, 33, 2, 32, torch.float32, True, ("expanded",)),
    "bfloat16": (1, 70, 2, 64, torch.bfloat16, True, ()),
}


def outcome(run, x, gain, table, gradient, special):
    """Output and gradients of one implementation, in float32 of what it was given."""
    leaf = x.clone().requires_grad_()
    gain = None if gain is None else gain.clone().requires_grad_()
    used = leaf
    if "slice" in special:
        used = torch.cat([torch.zeros_like(leaf), leaf], dim=2)[:, :, leaf.size(2) :]
    if "apart" in special:
        used = leaf.transpose(1, 2).contiguous().transpose(1, 2)
    out = run(used, gain, *table, 1e-6)
    leaves = {"x": leaf} if gain is None else {"x": leaf, "gain": gain}
    found = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}


def compare(shape):
    """A case: the ratios of everything."""
    from hymba_lightning.ops.rotary_norm import triton_launches as module

    module.TARGET_PROGRAMS = 2 if "few programs" in shape[-1] else 792
    batch, length, heads, width, dtype, has_gain, special = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, heads, width, generator=generator).to(dtype)
    gain = 1 + torch.randn(heads, generator=generator) if has_gain else None
    table = rope_table(3, length, width, 10000.0, torch.device("cpu"))
    gradient = torch.randn(x.shape, generator=generator).to(dtype)
    if "expanded" in special:
        gradient = gradient[:1, :1, :1, :1].expand(x.shape)
    expected = outcome(RotaryNorm.apply, x.float(), gain, table, gradient.float(), special)
    expected = {name: value if name == "dgain" else value.to(dtype) for name, value in expected.items()}
    return {"ratios": differences(outcome(module.rotary_norm_triton_op, x, gain, table, gradient, special), expected)}


def compile_and_check():
    """The operator's registrations, and one graph forward and backward without a break."""
    from hymba_lightning.ops.rotary_norm.triton_launches import rotary_norm_triton_op

    x, gain = torch.randn(1, 20, 2, 32, requires_grad=True), torch.randn(2, requires_grad=True)
    table = rope_table(0, 20, 32, 10000.0, torch.device("cpu"))
    torch.library.opcheck(rotary_norm_triton_op, (x, gain, *table, 1e-6))
    torch.library.opcheck(rotary_norm_triton_op, (x, None, *table, 1e-6))

    def loss(x, gain):
        return rotary_norm(x * 1.0, gain, *table, 1e-6, backend="triton").pow(3).sum()

    expected = torch.autograd.grad(loss(x, gain), (x, gain))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, gain), (x, gain))
    return {"ratios": differences(dict(zip("xg", found, strict=True)), dict(zip("xg", expected, strict=True)))}


CASES = {name: functools.partial(compare, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHAPES)
def test_kernels_agree_with_torchs_operators(results, case):
    assert_within(results[case], BFLOAT16 if SHAPES[case][4] is torch.bfloat16 else FLOAT32)


@pytest.mark.slow
def test_compiles_into_one_graph(results):
    assert_within(results["compiled"], FLOAT32)


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [(48, torch.float32, 1), (16, torch.float32, 1), (32, torch.float64, 1), (32, torch.float32, 2)],
)
def test_what_the_kernels_do_not_take_is_refused(width, dtype, rows, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cos, sin = rope_table(0, 20, width, 10000.0, torch.device("cpu"))
    if rows > 1:
        cos, sin = cos.expand(rows, *cos.shape), sin.expand(rows, *sin.shape)
    with pytest.raises(BackendUnavailableError, match="alike placed in all rows"):
        rotary_norm(torch.zeros(rows, 20, 2, width, dtype=dtype), None, cos, sin, 1e-6, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
@pytest.mark.parametrize(
    ("positions", "gains", "said"), [(19, 2, "19 and 19 positions"), (1, 2, "1 and"), (20, 1, "2 heads")]
)
def test_tables_and_gains_of_another_size_are_refused(backend, positions, gains, said, monkeypatch):
    """Kernels would go on behind their ends."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    table = rope_table(0, positions, 32, 10000.0, torch.device("cpu"))
    with pytest.raises(ValueError, match=said):
        rotary_norm(torch.zeros(1, 20, 2, 32), torch.ones(gains), *table, 1e-6, backend=backend)


if __name__ == "__main__":
    run_cases(CASES | {"compiled": compile_and_check})
