"""What the launches of every Triton kernel have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops.registry import needs_triton

# One warp per program, so that no warp waits at a barrier. Fused multiply-adds are asked for by name, since Triton is
# going to change its default.
COMPILE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of the GPU; 132, as a Hopper has, where the device is no GPU (Triton's
    interpreter, kernels compiled only to be inspected)."""
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
