"""Symmetric quantization of matrices to 2-8 bits, one float16 scale per row. R rows, C columns.

A row w becomes q * scale * 2^exponent with |q| <= q_max = 2^(bits-1) - 1. The exponent is one integer per tensor that
brings the largest row's scale into [2^8, 2^9): float16 then holds the scales of all rows down to 2^-22 of the largest
at full precision, whatever the tensor's size, and needs no floor; above it is room to make all scales coarser.

Columns may have factors of their own besides, in quarters of an octave: entry (r, c) is then
q * scale[r] * 2^exponent * 2^(columns[c] / 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.quantization.format import COLUMN_FACTORS

SCALE_TOP_EXPONENT = 8
MAX_COARSEN = 64.0
TINIEST_SCALE = 2.0**-24  # float16's smallest positive number


class QuantizedTensor(NamedTuple):
    """A matrix as integers and one scale per row."""

    q: Tensor  # (R, C) int8, |q| <= 2^(bits-1) - 1
    scale: Tensor  # (R,) float16, never negative
    exponent: int  # row scales are scale * 2^exponent
    bits: int
    columns: Tensor | None = None  # (C,) int8, quarters of an octave: the columns' factors; None for none


def q_max_of(bits: int) -> int:
    """Largest integer of a symmetric code of 2 to 8 bits. Raises ValueError outside that range."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 2 to 8")
    return 2 ** (bits - 1) - 1


def as_rows(tensor: Tensor) -> Tensor:
    """Any tensor as (R, C): the last axis is a row."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the tensor and its first bad row unless every entry is finite."""
    finite_R = torch.isfinite(as_rows(tensor)).all(dim=1)
    if not finite_R.all():
        row = int(finite_R.logical_not().nonzero()[0])
        raise ValueError(
            f"{name}: row {row} has inf or NaN, so it cannot be exported; training diverged, or a kernel "
            f"returned rubbish: export an earlier checkpoint"
        )


def quantize_rows(
    weight: Tensor, bits: int, *, clip_quantile: float = 0.999, clip_steps: int = 17, name: str = "tensor"
) -> QuantizedTensor:
    """Rounds each row of `weight` with the clip, among quantiles of its magnitudes, of least squared error.

    weight: any float shape, rows along the last axis. The error is computed with the float16 scale that is stored.
    Raises ValueError naming `name` for inf or NaN.
    """
    q_max = q_max_of(bits)
    check_finite(name, weight)
    rows_RC, exponent = normalise(as_rows(weight.detach()), q_max)
    scale_R = search_scale(rows_RC, q_max, clip_quantile, clip_steps)
    return QuantizedTensor(round_to(rows_RC, scale_R, q_max).to(torch.int8), scale_R.half(), exponent, bits)


def dequantize_rows(tensor: QuantizedTensor) -> Tensor:
    """(R, C) float32."""
    scale_R = (tensor.scale.double() * 2.0**tensor.exponent).float()
    rows_RC = tensor.q.float().mul_(scale_R[:, None])
    return rows_RC if tensor.columns is None else rows_RC.mul_(column_factors(tensor.columns))


def column_factors(columns_C: Tensor) -> Tensor:
    """2^(columns / 4) as float32 (C,), the same on every machine."""
    return torch.from_numpy(COLUMN_FACTORS)[columns_C.cpu().long() + 128].to(columns_C.device)


def normalise(rows_RC: Tensor, q_max: int) -> tuple[Tensor, int]:
    """`rows` times 2^-exponent in float32, with the exponent that puts the largest entry's scale in [2^8, 2^9)."""
    largest = float(rows_RC.abs().amax()) if rows_RC.numel() else 0.0
    if largest == 0:
        return rows_RC.float(), 0
    exponent = math.frexp(largest / q_max)[1] - 1 - SCALE_TOP_EXPONENT
    return (rows_RC.double() * 2.0**-exponent).float(), exponent


def search_scale(
    rows_RC: Tensor, q_max: int, clip_quantile: float, clip_steps: int, importance_C: Tensor | None = None
) -> Tensor:
    """The float16 scale of each row, as float32 (R,), whose rounding leaves the least squared error.

    `importance` (C,) weighs the columns' errors.
    """
    best_error_R = torch.full((len(rows_RC),), math.inf, device=rows_RC.device)
    best_scale_R = torch.full_like(best_error_R, TINIEST_SCALE)
    for clip_R in clip_candidates(rows_RC.abs(), clip_quantile, clip_steps if clip_quantile < 1 else 1):
        scale_R = (clip_R / q_max).half().float().clamp_min(TINIEST_SCALE)
        q_RC = round_to(rows_RC, scale_R, q_max)
        error_RC = q_RC.mul_(-scale_R[:, None]).add_(rows_RC).square_()
        error_R = error_RC.sum(dim=1) if importance_C is None else error_RC @ importance_C
        better_R = error_R < best_error_R
        best_error_R = torch.where(better_R, error_R, best_error_R)
        best_scale_R = torch.where(better_R, scale_R, best_scale_R)
    return best_scale_R


def round_to(rows_RC: Tensor, scale_R: Tensor, q_max: int) -> Tensor:
    """Nearest q of each entry, as float32."""
    return (rows_RC / scale_R[:, None]).round_().clamp_(-q_max, q_max)


def clip_candidates(magnitude_RC: Tensor, lowest: float, steps: int) -> Tensor:
    """Quantiles `lowest` … 1 of each row (linear between order statistics), largest first: (steps, R).

    Only the few largest entries of a row are sorted out, so long rows and large tensors stay cheap.
    """
    last = magnitude_RC.shape[1] - 1
    if last < 1:
        return magnitude_RC[:, 0].expand(steps, -1)
    # Position from the top: 0 is the largest magnitude.
    depths = torch.linspace(0, (1 - lowest) * last, steps, dtype=torch.float64)
    top_RK = magnitude_RC.topk(min(int(depths[-1]) + 2, last + 1), dim=1).values
    above = depths.long().clamp_max(top_RK.shape[1] - 2)
    fraction_S1 = (depths - above).float().to(top_RK.device)[:, None]
    top_KR = top_RK.T
    return torch.lerp(top_KR[above], top_KR[above + 1], fraction_S1)


def coarsen_rows(weight: Tensor, tensor: QuantizedTensor, factor: float) -> QuantizedTensor:
    """`weight` rounded again with every row scale of `tensor` times `factor` (1 … 64): fewer levels, fewer bytes."""
    scale_R = coarser_scale(tensor.scale.float(), factor)
    rows_RC = (as_rows(weight.detach()).double() * 2.0**-tensor.exponent).float()
    if tensor.columns is not None:
        rows_RC /= column_factors(tensor.columns)
    return tensor._replace(q=round_to(rows_RC, scale_R, q_max_of(tensor.bits)).to(torch.int8), scale=scale_R.half())


def coarser_scale(scale_R: Tensor, factor: float) -> Tensor:
    """Scales that float16 holds, `factor` times as large, as float32."""
    return (scale_R * factor).half().float().clamp_min(TINIEST_SCALE)
