"""What the op tests share: devices, tolerances, the gradients of a call in one list, and how results are compared."""

import pytest
import torch

from hymba_lightning.ops.registry import OPERATIONS, available_backends
from hymba_lightning.ops.testing import rms_ratio

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# RMS(error) / RMS(reference). Both sides round bfloat16 results once, from sums that differ in order.
RATIO = {torch.float32: 3e-6, torch.bfloat16: 5e-3}


def on(device, *backends):
    """Parameters (backend, device) for tests of `backends` on a type of device."""
    return [
        pytest.param(backend, device, marks=NEEDS_GPU if device == "cuda" else [], id=f"{backend}-{device}")
        for backend in backends
    ]


def cpu_backends(op):
    """Backends of `op` to be held to its definition on a CPU here; Triton's have tests of their own."""
    found = [name for name in available_backends(op, "cpu") if name not in ("naive", "triton")]
    # Required, so that where it is missing no test is left out in silence.
    assert "numba" not in OPERATIONS[op] or "numba" in found
    return found


def gpu_backends(op):
    """Those that also run on a GPU as they are."""
    return [name for name in cpu_backends(op) if not OPERATIONS[op][name].devices]


def random(*shape, device="cpu", dtype=torch.float32, seed=0):
    """Normal numbers that are the same on every device and, up to rounding, in every type."""
    generator = torch.Generator().manual_seed(seed + sum(place * size for place, size in enumerate(shape, 1)))
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def outputs_and_gradients(call, operands, weights):
    """`call(**operands)`'s tensors, and by name the gradients of Σ (tensor * weight) over those that have a weight."""
    leaves = {name: x if x is None else x.detach().clone().requires_grad_() for name, x in operands.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (out.float() * weight.float()).sum() for out, weight in zip(outputs, weights, strict=True) if weight is not None
    )
    loss.backward()
    return [out.detach() for out in outputs], {name: x.grad for name, x in leaves.items() if x is not None}


def assert_close(name, actual, expected, ratio):
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


def _kind(tensor):
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
