"""Checks every kernel on a GPU against its definition, then times it."""

from __future__ import annotations

import torch
import triton

from hymba_lightning.ops import product_check, triton_check

PARTS = ("streams", "products")


def check(only: str | None = None, quick: bool = False, *, timings: bool = True, sweep: bool = False) -> bool:
    """Checks, then times, and prints both. Returns whether every kernel is right.

    Args:
        only: "streams" (scan, convolution, loss, heads' norm and turn) or "products" (attention, MLP, Newton-Schulz,
            Muon's passes); None for both.
        quick: fewer shapes, bfloat16 only: each compiles its kernels.
        timings: leave them out under compute-sanitizer.
        sweep: also time other launch constants.
    """
    parts = PARTS if only is None else (only,)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    passed = "streams" not in parts or triton_check.check(quick)
    passed &= "products" not in parts or product_check.check(quick)
    if not passed:
        print("not timed: a check failed")
        return False
    if not timings:
        return True
    if "products" in parts:
        product_check.timings()
        if sweep:
            product_check.sweep()
    if "streams" in parts:
        rate = triton_check.copy_rate()
        print(f"copy {rate / 1e9:.0f} GB/s; B, T, E = {triton_check.TRAINING[:3]}")
        sizes = ((torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float32, 8))
        for dtype, states in sizes[:1] if quick else sizes:
            triton_check.timings(dtype, states, rate)
        triton_check.kernel_times()
        if sweep:
            triton_check.sweep()
    return True
