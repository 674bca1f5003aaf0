"""Comparing an op with its reference by one number, RMS(error) / RMS(reference)."""

from __future__ import annotations

from torch import Tensor


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64; RMS(actual) itself where the reference is all zero."""
    error = (actual.double() - expected.double()).square().mean().sqrt().item()
    scale = expected.double().square().mean().sqrt().item()
    return error / scale if scale > 0 else error
