"""The Triton kernels from the command line: checked and timed on a GPU, or compiled for several without one."""

from __future__ import annotations

import sys

import torch

from hymba_lightning.errors import UsageError
from hymba_lightning.studies.arguments import StudyParser


def main(args: list[str]) -> None:
    """`hymba study kernels`. Exits with 1 where a kernel is wrong, or spills."""
    parser = StudyParser("kernels", "Exits with 1 where a kernel is wrong, or spills registers.")
    parser.add_argument(
        "--resources",
        action="store_true",
        help="Compile for sm_80, sm_90 and sm_100 instead, which needs no GPU, and print what each kernel takes",
    )
    parser.add_argument("--sweep", action="store_true", help="Also time other launch constants")
    parser.add_argument("--quick", action="store_true", help="Fewer shapes, bfloat16 only: each compiles its kernels")
    parser.add_argument("--check_only", action="store_true", help="No timings, as under compute-sanitizer")
    parser.add_argument(
        "--only",
        choices=["streams", "products"],
        help="streams: scan, convolution, loss, heads' norm and turn; products: attention, MLP, Muon",
    )
    options = parser.read(args)
    if options.resources:
        from hymba_lightning.ops import triton_resources

        right = triton_resources.report_all()
    elif not torch.cuda.is_available():
        raise UsageError("there is no GPU to run the kernels on: --resources compiles them without one")
    else:
        from hymba_lightning.ops import gpu_check

        right = gpu_check.check(options.only, options.quick, timings=not options.check_only, sweep=options.sweep)
    if not right:
        sys.exit(1)
