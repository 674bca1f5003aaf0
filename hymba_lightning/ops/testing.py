"""Comparing an op with its reference by one number, RMS(error) / RMS(reference)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64; RMS(actual) itself where the reference is all zero."""
    error = (actual.double() - expected.double()).square().mean().sqrt().item()
    scale = expected.double().square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, ratio: float) -> None:
    """Raises AssertionError unless shape and dtype agree, all is finite and the RMS ratio is at most `ratio`."""
    if (actual is None) != (expected is None):
        raise AssertionError(f"{name}: got {_kind(actual)}, expected {_kind(expected)}")
    if actual is None or expected is None:
        return
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: got {_kind(actual)}, expected {_kind(expected)}")
    if actual.numel() == 0:
        return
    if not torch.isfinite(actual).all():
        bad = (~torch.isfinite(actual)).sum().item()
        first = tuple((~torch.isfinite(actual)).nonzero()[0].tolist())
        raise AssertionError(f"{name}: {bad} of {actual.numel()} entries are not finite, the first at {first}")
    found = rms_ratio(actual, expected)
    if not found <= ratio:
        error = (actual.double() - expected.double()).abs()
        worst = tuple(torch.stack(torch.unravel_index(error.argmax(), error.shape)).tolist())
        raise AssertionError(
            f"{name}: RMS ratio {found:.3g} is over {ratio:.3g}; the worst entry, at {worst}, is "
            f"{actual[worst].item():.6g} and should be {expected[worst].item():.6g}"
        )


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
