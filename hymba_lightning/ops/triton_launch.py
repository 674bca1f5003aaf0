"""Shared by the launches of all Triton kernels: properties of the GPU, and tensors in the layout that kernels read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hymba_lightning.ops.registry import needs_triton

# One warp per program, so that no warp waits at a barrier, unless a launch asks for more. Fused multiply-adds are asked
# for by name, since Triton is going to change its default.
COMPILE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of the GPU; 132, as a Hopper has, where the device is no GPU (Triton's
    interpreter, kernels compiled only to be inspected)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def can_prefetch(device: torch.device) -> bool:
    """Whether kernels for the device may contain PTX, NVIDIA's assembly: not in Triton's interpreter, which runs on the
    CPU, and not on other makers' GPUs."""
    return device.type != "cpu" and torch.version.hip is None


def readable(x: Tensor) -> Tensor:
    """`x` as a kernel can address it, with neighbours of the last dimension side by side in memory: `x` itself where
    that holds, whatever its other strides, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def hopper_missing(device_type: str) -> str | None:
    """Why kernels that were made for a Hopper (compute capability 9) cannot run there, None where they can: on such a
    GPU, or in Triton's interpreter (tests). For the `check` of a backend's entry."""
    reason = needs_triton(device_type)
    if reason is None and device_type == "cuda":
        major = torch.cuda.get_device_capability()[0]
        if torch.version.hip is not None or major != 9:
            return f"its kernels are made for Hopper GPUs (compute capability 9), this one has {major}"
    return reason
