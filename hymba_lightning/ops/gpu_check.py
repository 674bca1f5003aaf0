"""Every kernel on a real GPU: compared with its definition, then timed."""

from __future__ import annotations

import argparse

import torch
import triton

from hymba_lightning.ops import product_check, triton_check

PARTS = ("streams", "products")


def main() -> int:
    """Checks, then times; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also time other launch constants")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, bfloat16 only: each compiles its kernels")
    parser.add_argument("--check_only", action="store_true", help="no timings, as under compute-sanitizer")
    parser.add_argument(
        "--only", choices=PARTS, help="streams: scan, convolution, loss; products: attention, MLP, Newton-Schulz"
    )
    arguments = parser.parse_args()
    parts = PARTS if arguments.only is None else (arguments.only,)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    passed = "streams" not in parts or triton_check.check(arguments.quick)
    passed &= "products" not in parts or product_check.check(arguments.quick)
    if not passed:
        print("not timed: a check failed")
        return 1
    if arguments.check_only:
        return 0
    if "products" in parts:
        product_check.timings()
        if arguments.sweep:
            product_check.sweep()
    if "streams" in parts:
        rate = triton_check.copy_rate()
        print(f"copy {rate / 1e9:.0f} GB/s; B, T, E = {triton_check.TRAINING[:3]}")
        sizes = ((torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float32, 8))
        for dtype, states in sizes[:1] if arguments.quick else sizes:
            triton_check.timings(dtype, states, rate)
        triton_check.kernel_times()
        if arguments.sweep:
            triton_check.sweep()
    return 0
