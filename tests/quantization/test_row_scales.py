"""The quantizer against an independent statement of it, the reference's vectors, and the extremes of float32."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.quantization.rows import (
    coarsen_rows,
    column_factors,
    dequantize_rows,
    quantize_rows,
)
from hymba_lightning.quantization.schemes.reference import quantize_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * 0.02


def row_errors(weight: torch.Tensor, bits: int, **options) -> torch.Tensor:
    return (dequantize_rows(quantize_rows(weight, bits, **options)) - weight).double().square().sum(dim=1)


@pytest.mark.parametrize("bits", [6, 8])
def test_reference_quantizer_is_reproduced_bit_for_bit(bits):
    golden = np.load(GOLDEN / f"quant_int{bits}_cliplite.npz", allow_pickle=False)
    result = quantize_reference(torch.from_numpy(golden["weight"]), bits)
    assert np.array_equal(result.q.numpy(), golden["q"])
    assert np.array_equal(result.scale.numpy(), golden["scale"])
    assert result.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [6, 8])
def test_repaired_quantizer_halves_the_reference_error(bits):
    weight = torch.from_numpy(np.load(GOLDEN / f"quant_int{bits}_cliplite.npz", allow_pickle=False)["weight"])
    reference = (dequantize_rows(quantize_reference(weight, bits)) - weight).square().mean()
    assert row_errors(weight, bits).sum() / weight.numel() < reference / 2


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_search_against_a_plain_loop_over_rows_and_quantiles(bits):
    weight = heavy_tailed(24, 1500)
    result = quantize_rows(weight, bits, clip_quantile=0.995, clip_steps=9)
    q_max = 2 ** (bits - 1) - 1
    for row, q, scale in zip(weight.double().numpy(), result.q.numpy(), result.scale.numpy(), strict=True):
        best_error, best_scale = np.inf, None
        for quantile in np.linspace(1, 0.995, 9):
            clip = np.quantile(np.abs(row), quantile) / 2.0**result.exponent
            candidate = float(np.float16(clip / q_max)) * 2.0**result.exponent
            error = np.square(row - np.clip(np.round(row / candidate), -q_max, q_max) * candidate).sum()
            if error < best_error:
                best_error, best_scale = error, candidate
        stored = float(scale) * 2.0**result.exponent
        # Two quantiles may tie but for float32 rounding of the error.
        assert np.square(row - q * stored).sum() <= best_error * (1 + 1e-5)
        assert stored == pytest.approx(best_scale, rel=0.02)


def test_rounding_uses_the_scale_that_is_stored():
    weight = heavy_tailed(64, 700)
    result = quantize_rows(weight, 6)
    scale = result.scale.double()[:, None] * 2.0**result.exponent
    expected = (weight.double() / scale).round().clamp(-31, 31)
    # float32 division may round a tie to the other side; the float32 copy of a scale moves 50 times as many.
    assert (result.q != expected).float().mean() < 1e-4


def test_every_row_chooses_its_own_clip():
    smooth = torch.linspace(-1, 1, 2000)
    spiked = smooth.clone()
    spiked[7] = 60.0
    errors = row_errors(torch.stack([smooth, spiked]), 6, clip_quantile=0.999)
    alone = torch.cat([row_errors(row[None], 6, clip_quantile=0.999) for row in (smooth, spiked)])
    torch.testing.assert_close(errors, alone, rtol=1e-3, atol=0)
    assert errors[0] < errors[1] / 100


def test_a_wider_search_is_never_worse():
    weight = heavy_tailed(50, 512)
    largest_only = row_errors(weight, 6, clip_quantile=1.0)
    assert (row_errors(weight, 6, clip_quantile=0.999) <= largest_only * (1 + 1e-6)).all()
    assert row_errors(weight, 6, clip_quantile=0.999).sum() < largest_only.sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(-120, 100), st.integers(1, 40), st.integers(0, 10**6))
def test_the_size_of_a_tensor_does_not_matter(bits, power, columns, seed):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    plain, scaled = quantize_rows(weight, bits), quantize_rows(weight * 2.0**power, bits)
    assert torch.equal(plain.q, scaled.q)
    assert torch.equal(plain.scale, scaled.scale)
    assert scaled.exponent == plain.exponent + power
    assert plain.q.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.isfinite(dequantize_rows(scaled)).all()


def test_rows_of_very_different_size_keep_their_precision():
    base = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([base * 1e3, base, base * 1e-4, torch.zeros(1, 300), base * 1e-30])
    restored = dequantize_rows(quantize_rows(weight, 6))
    relative = (restored - weight).norm(dim=1)[:3] / weight.norm(dim=1)[:3]
    assert relative.max() < 0.03
    assert (restored[3:] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-36, 3e38])
def test_the_ends_of_float32(magnitude):
    weight = torch.tensor([[magnitude, -magnitude, 0.0], [0.0, 0.0, 0.0]])
    restored = dequantize_rows(quantize_rows(weight, 6))
    torch.testing.assert_close(restored, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", [quantize_rows, quantize_reference])
def test_inf_and_nan_name_the_tensor_and_row(bad, quantize):
    weight = torch.ones(4, 8)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match=re.escape("blocks.3.mlp.fc.weight: row 2")):
        quantize(weight, 6, name="blocks.3.mlp.fc.weight")


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_the_range_are_refused(bits):
    with pytest.raises(ValueError, match="outside 2 to 8"):
        quantize_rows(torch.ones(2, 2), bits)


def test_coarser_rows_use_fewer_levels_and_keep_the_stored_scale():
    weight = heavy_tailed(16, 400)
    fine = quantize_rows(weight, 6)
    coarse = coarsen_rows(weight, fine, 1.7)
    assert coarse.q.unique().numel() < fine.q.unique().numel()
    torch.testing.assert_close(
        coarse.scale.float() * 2.0 ** (coarse.exponent - fine.exponent), fine.scale.float() * 1.7, rtol=1e-3, atol=0
    )
    scale = coarse.scale.double()[:, None] * 2.0**coarse.exponent
    assert ((weight.double() / scale).round().clamp(-31, 31) != coarse.q).float().mean() < 1e-3


def test_coarser_rows_keep_their_columns_factors():
    weight, columns = torch.randn(16, 400, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 9 - 4
    fine = quantize_rows(weight / column_factors(columns), 8)._replace(columns=columns.to(torch.int8))
    coarse = coarsen_rows(weight, fine, 2.0)
    assert coarse.columns is fine.columns
    assert float((dequantize_rows(coarse) - weight).norm()) < 0.1 * float(weight.norm())
