"""What the launches of every Triton kernel have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops.registry import needs_triton

# One warp a program, so that no barrier waits for another. Products and sums fused, which Triton will stop assuming.
COMPILE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; for what is not run on one (the interpreter, a look at the compiled code) those of a Hopper."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def can_prefetch(device: torch.device) -> bool:
    """Whether kernels for the device may hold NVIDIA's assembly: not in the interpreter, nor on others' GPUs."""
    return device.type != "cpu" and torch.version.hip is None


def readable(x: Tensor) -> Tensor:
    """x itself, with any stride but over its last dimension, or a copy if that is not contiguous."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def as_gradient(x: Tensor, like: Tensor) -> Tensor:
    """x in the type of `like`, contiguous and in memory of its own, as an operator has to return it."""
    return x.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def hopper_missing(device_type: str) -> str | None:
    """`missing` of a backend whose kernels were made for a Hopper: such a GPU, or the interpreter (tests)."""
    reason = needs_triton(device_type)
    if reason is None and device_type == "cuda":
        major = torch.cuda.get_device_capability()[0]
        if torch.version.hip is not None or major != 9:
            return f"its kernels are made for Hopper GPUs (compute capability 9), this one has {major}"
    return reason
