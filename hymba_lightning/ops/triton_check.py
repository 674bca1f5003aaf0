"""Checks scan, convolution, loss and the heads' norm and turn on a GPU against their definitions, then compares times
of the first three with the bytes moved.

B batch, T sequence, E channels, N states, W taps; of the loss N tokens, V vocabulary; H heads, K head_dim.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.ops.causal_conv1d import causal_conv1d
from hymba_lightning.ops.causal_conv1d.naive import causal_conv1d_naive
from hymba_lightning.ops.registry import is_installed
from hymba_lightning.ops.rotary_norm import rotary_norm
from hymba_lightning.ops.selective_scan import selective_scan
from hymba_lightning.ops.selective_scan import triton_launches as scan_triton
from hymba_lightning.ops.selective_scan.backend_chunked import selective_scan_chunked
from hymba_lightning.ops.selective_scan.backend_mamba_ssm import selective_scan_own_autograd
from hymba_lightning.ops.selective_scan.naive import selective_scan_naive
from hymba_lightning.ops.softcapped_cross_entropy import softcapped_cross_entropy
from hymba_lightning.ops.testing import rms_ratio

# Largest RMS(error) / RMS(reference) that passes, by the operands' type.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
ODD_SCANS = ((2, 63, 60, 5), (1, 1, 4, 1), (3, 257, 96, 16), (1, 130, 512, 33), (2, 1000, 130, 64))
ODD_CONVS = ((2, 63, 60, 4), (1, 1, 4, 8), (3, 257, 130, 3), (1, 40, 6, 1))
ODD_LOSSES = ((63, 60), (1, 1), (700, 1023), (40, 50257))
ODD_HEADS = ((2, 63, 3, 32), (1, 1, 2, 64), (3, 257, 5, 128), (1, 2000, 8, 64))
TRAINING = (2, 32768, 512, 8)
TRAINING_HEADS = (2, 32768, 8, 64)
VOCAB = 1024
# What a sweep tries: programs for each multiprocessor, channels of a forward program, registers of a backward thread.
SWEEP = {
    "FORWARD_PROGRAMS": (16, 24, 48),
    "BACKWARD_PROGRAMS": (16, 24, 32, 64),
    "FORWARD_BLOCK_E": (32, 64, 128),
    "BACKWARD_REGISTERS": (168, 224, 255),
}
Inputs = dict[str, Tensor | None]
Run = Callable[[Any], tuple[Tensor, ...]]


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Inside, torch.empty fills what it allocates with NaN, so that an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def scan_inputs(batch: int, length: int, channels: int, states: int, dtype: torch.dtype, gated: bool = True) -> Inputs:
    """Random operands as the network makes them: z, B and C are slices of wider tensors, dt is 0.001 to 0.1."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    z = normal(batch, length, 2 * channels, dtype=dtype)[..., channels:] if gated else None
    B, C = normal(batch, length, 2 * states, dtype=dtype).split(states, dim=-1)
    step = torch.empty(channels, device="cuda").uniform_(-7, -2).exp()
    A = -torch.arange(1, states + 1, device="cuda").float() * (1 + 0.1 * normal(channels, 1).abs())
    return {
        "u": normal(batch, length, channels, dtype=dtype),
        "dt": normal(batch, length, channels, dtype=dtype),
        "A": A,
        "B": B,
        "C": C,
        "D": normal(channels),
        "z": z,
        "dt_bias": step.expm1().log(),
        "initial_state": normal(batch, channels, states),
    }


def conv_inputs(batch: int, length: int, channels: int, taps: int, dtype: torch.dtype) -> Inputs:
    """Random operands, x being a slice of a wider tensor."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    return {
        "x": normal(batch, length, 2 * channels).to(dtype)[..., :channels],
        "weight": normal(channels, taps),
        "bias": normal(channels),
        "initial_state": normal(batch, channels, taps - 1).to(dtype),
    }


def run_triton_scan(i: Any) -> tuple[Tensor, Tensor]:
    """Output and state of the kernels under test."""
    out = selective_scan(
        i["u"],
        i["dt"],
        i["A"],
        i["B"],
        i["C"],
        i["D"],
        i["z"],
        dt_bias_E=i["dt_bias"],
        initial_state_BEN=i["initial_state"],
        return_state=True,
        backend="triton",
    )
    assert isinstance(out, tuple)
    return out


def run_triton_conv(i: Any) -> tuple[Tensor, Tensor]:
    """Output and state of the kernels under test."""
    out = causal_conv1d(
        i["x"], i["weight"], i["bias"], initial_state_BEW1=i["initial_state"], return_state=True, backend="triton"
    )
    assert isinstance(out, tuple)
    return out


def loss_inputs(tokens: int, vocab: int, dtype: torch.dtype) -> Inputs:
    """Random logits, some of them beyond the cap."""
    return {"logits": (20 * torch.randn(tokens, vocab, device="cuda")).to(dtype)}


def run_loss(i: Any, backend: str = "triton") -> tuple[Tensor]:
    """The loss, at targets made from the shape alone, so that every backend gets the same."""
    tokens, vocab = i["logits"].shape
    targets = torch.arange(tokens, device=i["logits"].device) * 7919 % vocab
    return (softcapped_cross_entropy(i["logits"], targets, cap=30.0, backend=backend),)


def head_inputs(batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> Inputs:
    """Random heads, the second half of a wider tensor's columns, and a gain for each."""
    wide = torch.randn(batch, length, 2 * heads * width, device="cuda")
    return {"wide": wide.to(dtype), "gain": 1 + torch.randn(heads, device="cuda")}


def run_heads(i: Any, backend: str = "triton") -> tuple[Tensor]:
    """Heads normalised and turned, by the tables of `model.attention.rope_table`."""
    heads = i["gain"].numel()
    x_BTHK = i["wide"].chunk(2, dim=-1)[1].unflatten(-1, (heads, -1))
    half = x_BTHK.size(-1) // 2
    position_T = torch.arange(x_BTHK.size(1), device=x_BTHK.device, dtype=torch.float32)
    angle = torch.outer(position_T, 10000.0 ** (-torch.arange(half, device=x_BTHK.device) / half))[:, None, None]
    table = angle.cos(), torch.cat((angle.sin(), -angle.sin()), dim=-2)
    return (rotary_norm(x_BTHK, i["gain"], *table, 1e-6, backend=backend),)


def results(run: Run, inputs: Inputs, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, state where there is one, and the gradient of every input, by name."""
    leaves = {name: x.detach().clone().requires_grad_() if x is not None else None for name, x in inputs.items()}
    outputs = run(leaves)[:2]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.numel()}
    found = torch.autograd.grad(
        outputs, list(wanted.values()), [g.to(x.dtype) for g, x in zip(gradients, outputs, strict=True)]
    )
    named = {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return dict(zip(("out", "state"), (x.detach() for x in outputs), strict=False)) | named


def compare(title: str, run: Run, reference: Run, inputs: Inputs, dtype: torch.dtype) -> bool:
    """Prints the worst of output, state and gradients against the reference on the same numbers in float32."""
    with torch.no_grad():
        gradients = tuple(torch.randn_like(x) for x in run(inputs))
    with fresh_memory_is_nan():
        found = results(run, inputs, gradients)
    expected = results(reference, {n: None if x is None else x.float() for n, x in inputs.items()}, gradients)
    ratios = {name: rms_ratio(found[name].float(), x.float()) for name, x in expected.items() if x.numel()}
    worst = max(ratios, key=lambda name: float("inf") if ratios[name] != ratios[name] else ratios[name])
    passed = ratios[worst] <= TOLERANCE[dtype]
    print(
        f"{title:<48} worst {worst:<14} {ratios[worst]:.2e} (limit {TOLERANCE[dtype]:.0e}) "
        f"{'ok' if passed else 'WRONG'}",
        flush=True,
    )
    return passed


def check(quick: bool = False) -> bool:
    """Every comparison, or with `quick` the first shape of each and the training shape in bfloat16; all passed?"""
    passed, first = True, 1 if quick else None
    for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        for shape in ODD_SCANS[:first]:
            for gated in (True, False):
                passed &= compare(
                    f"scan {shape} {label}{'' if gated else ', no gate'}",
                    run_triton_scan,
                    lambda i: selective_scan_naive(*i.values()),
                    scan_inputs(*shape, dtype, gated),
                    dtype,
                )
        for shape in ODD_CONVS[:first]:
            passed &= compare(
                f"conv {shape} {label}",
                run_triton_conv,
                lambda i: causal_conv1d_naive(i["x"], i["weight"], i["bias"], True, i["initial_state"]),
                conv_inputs(*shape, dtype),
                dtype,
            )
        for tokens, vocab in (*ODD_LOSSES[:first], (65536, VOCAB)):
            passed &= compare(
                f"loss {(tokens, vocab)} {label}",
                run_loss,
                functools.partial(run_loss, backend="naive"),
                loss_inputs(tokens, vocab, dtype),
                dtype,
            )
        for shape in (*ODD_HEADS[:first], TRAINING_HEADS):
            passed &= compare(
                f"heads {shape} {label}",
                run_heads,
                functools.partial(run_heads, backend="torch"),
                head_inputs(*shape, dtype),
                dtype,
            )
        passed &= compare(
            f"scan {TRAINING} {label}, against chunked",
            run_triton_scan,
            lambda i: selective_scan_chunked(*i.values()),
            scan_inputs(*TRAINING, dtype),
            dtype,
        )
    return passed


def median_ms(call: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a call on the device, in milliseconds, after five calls to warm up."""
    for _ in range(5):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def forward_and_backward(run: Run, inputs: Inputs) -> tuple[Callable, Callable]:
    """Two calls: the forward alone, without autograd, and the forward with every gradient."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    g_out = torch.randn_like(run(inputs)[0])

    @torch.no_grad()
    def forward() -> None:
        run(inputs)

    def both() -> None:
        torch.autograd.grad(run(leaves)[0], wanted, g_out)

    return forward, both


def run_mamba_scan(i: Any) -> tuple[Tensor]:
    """mamba-ssm's scan as its users call it on our layout, the copies included."""
    return (selective_scan_own_autograd(*(i[name] for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias"))),)


def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (median_ms(lambda: target.copy_(source)) * 1e-3)


def timings(dtype: torch.dtype, states: int, rate: float) -> None:
    """Prints forward, and forward with backward, beside the time that the bytes alone would take at the copy rate."""
    batch, length, channels, _ = TRAINING
    tensor = batch * length * channels * dtype.itemsize
    narrow, wide = (batch * length * size * dtype.itemsize for size in (states, VOCAB))
    calls: dict[str, tuple[Run, Inputs, int, int]] = {
        "scan triton": (
            run_triton_scan,
            scan_inputs(batch, length, channels, states, dtype),
            4 * tensor + 2 * narrow,
            7 * tensor + 4 * narrow,
        ),
        "conv triton": (run_triton_conv, conv_inputs(batch, length, channels, 4, dtype), 2 * tensor, 3 * tensor),
        "loss triton": (run_loss, loss_inputs(batch * length, VOCAB, dtype), wide, 2 * wide),
    }
    if is_installed("selective_scan_cuda"):
        # No initial state there: the same operands without it.
        inputs = {n: x for n, x in scan_inputs(batch, length, channels, states, dtype).items() if n != "initial_state"}
        calls["scan mamba_ssm"] = (run_mamba_scan, inputs, 4 * tensor + 2 * narrow, 7 * tensor + 4 * narrow)
    for name, (run, inputs, forward_bytes, backward_bytes) in calls.items():
        began = time.perf_counter()
        forward, both = forward_and_backward(run, inputs)
        both()
        torch.cuda.synchronize()
        compiled = time.perf_counter() - began
        forward_ms, both_ms = median_ms(forward), median_ms(both)
        floor_f, floor_b = forward_bytes / rate * 1e3, (forward_bytes + backward_bytes) / rate * 1e3
        print(
            f"{name:<16} N={states:<3} {str(dtype).removeprefix('torch.'):<9} forward {forward_ms:.3f} ms (floor "
            f"{floor_f:.3f}), with backward {both_ms:.3f} ms (floor {floor_b:.3f}), "
            f"{(forward_bytes + backward_bytes) / both_ms / 1e6:.0f} GB/s of the floor's bytes; first call "
            f"{compiled:.1f} s",
            flush=True,
        )


def kernel_times() -> None:
    """Prints the device time of each kernel of one scan, one convolution and one loss, both passes, bfloat16."""
    _, scan = forward_and_backward(run_triton_scan, scan_inputs(*TRAINING, torch.bfloat16))
    _, conv = forward_and_backward(run_triton_conv, conv_inputs(*TRAINING[:3], 4, torch.bfloat16))
    _, loss = forward_and_backward(run_loss, loss_inputs(TRAINING[0] * TRAINING[1], VOCAB, torch.bfloat16))
    for call in (scan, conv, loss):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
        for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
            print(f"  {event.self_device_time_total / 10:>9.1f} us  {event.count / 10:>4.0f}x  {event.key[:80]}")


def sweep() -> None:
    """Times the bfloat16 scan with one constant of the launch changed at a time."""
    inputs = scan_inputs(*TRAINING, torch.bfloat16)
    for name, values in SWEEP.items():
        usual = getattr(scan_triton, name)
        for value in values:
            setattr(scan_triton, name, value)
            forward, both = forward_and_backward(run_triton_scan, inputs)
            forward_ms, both_ms = median_ms(forward), median_ms(both)
            print(f"{name} {value:>6}: forward {forward_ms:.3f} ms, with backward {both_ms:.3f} ms", flush=True)
        setattr(scan_triton, name, usual)
