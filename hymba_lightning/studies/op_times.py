"""Times of the ops and their peers: medians over interleaved rounds, beside what the machine itself can do.

A contender is timed only after its output and gradients have been compared with the naive definition. On a GPU a
contender is replayed as a CUDA graph: its kernels and copies count, Python's launches do not. One that cannot be
captured is timed with its launches, and its row says so.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hymba_lightning.ops.testing import rms_ratio
from hymba_lightning.studies.arguments import StudyParser, source_version
from hymba_lightning.studies.op_peers import Contender
from hymba_lightning.studies.op_subjects import OPS, Operands, Subject, subjects

log = logging.getLogger("hymba_lightning")

# Largest RMS(error) / RMS(reference) of a contender that is timed. Tensor cores round float32 factors to 10 bits.
TOLERANCE = {("cpu", torch.float32): 1e-4, ("cuda", torch.float32): 5e-3}
TOLERANCE_16_BIT = 2e-2


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches on the simplest work of each kind."""

    copy_gb_per_s: float
    """Bytes read plus bytes written."""

    matmul_tflops: float

    def floor_ms(self, subject: Subject) -> float:
        """The least time of forward + backward that either limit allows."""
        return max(subject.megabytes / self.copy_gb_per_s, subject.gigaflops / self.matmul_tflops)


@dataclass(frozen=True)
class OpTime:
    """A contender's median times in milliseconds, or the reason why it has none."""

    forward: float
    both: float
    spread: tuple[float, float]
    extra_megabytes: float | None
    problem: str = ""
    with_launches: bool = False
    """On a GPU: Python's launches count too."""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """`run` as one CUDA graph: a small op is then timed by its kernels, not by how fast Python launches them. None,
    with a warning, where it cannot be captured."""
    try:
        # Capture wants everything compiled and allocated once, on a stream of its own.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        log.warning("not captured as a CUDA graph, timed with its launches: %s", str(error).partition("\n")[0])
        return None
    return graph.replay


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copies and multiplies for a moment; the best of ten."""
    size = 2**28 if device.type == "cuda" else 2**24
    source, side = torch.ones(size, device=device), 8192 if device.type == "cuda" else 1536
    target = torch.zeros_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in "ab")
    copy = min(_milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    matmul = min(_milliseconds(lambda: a @ b, device) for _ in range(10))
    return Ceilings(2 * source.nbytes / copy / 1e6, 2 * side**3 / matmul / 1e9)


def _gradients(run: Callable[..., Tensor], operands: Operands, weight: Tensor) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    out = run(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), weight.to(out.dtype))]


def problem_with(contender: Contender, subject: Subject) -> str:
    """Empty where output and gradients agree with the definition at up to 700 tokens, else what does not."""
    operands = subject.operands(min(subject.length, 700))
    first = next(iter(operands.values()))
    with torch.no_grad():
        weight = torch.randn_like(subject.definition(**operands))
    found, expected = (_gradients(run, operands, weight) for run in (contender.run, subject.definition))
    tolerance = TOLERANCE.get((first.device.type, first.dtype), TOLERANCE_16_BIT)
    for name, actual, reference in zip(("out", *operands), found, expected, strict=True):
        ratio = rms_ratio(actual, reference)
        if not ratio <= tolerance:
            return f"wrong: {name} is off by {ratio:.1e}, not timed"
    return ""


def _peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that `run` takes at its height, beyond what was in use; None where that cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None

    def kilobytes(field: str) -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    # Freed memory that the C library keeps would hide what is taken from it. Then VmHWM falls to what is resident now.
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5", encoding="utf-8")
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


def time_subject(subject: Subject, rounds: int) -> dict[str, OpTime]:
    """Every contender in turn, `rounds` times over, so that a machine that slows down slows all of them."""
    operands = subject.operands(subject.length)
    leaves = {name: x.requires_grad_() for name, x in operands.items()}
    device = next(iter(leaves.values())).device
    results: dict[str, OpTime] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, float | None] = {}

    def both(contender: Contender) -> None:
        out = contender.run(**leaves)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    for contender in subject.contenders:
        problem = problem_with(contender, subject)
        if problem:
            results[contender.name] = OpTime(0.0, 0.0, (0.0, 0.0), None, problem)
        else:
            both(contender)
            memory[contender.name] = _peak_memory(functools.partial(both, contender), device)
            times[contender.name] = []
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    launched = set()
    for contender in subject.contenders:
        if contender.name in times:
            pair = functools.partial(contender.run, **leaves), functools.partial(both, contender)
            graphs = [_captured(run) for run in pair] if device.type == "cuda" else []
            forward_graph, both_graph = graphs or (None, None)
            if forward_graph is not None and both_graph is not None:
                runs[contender.name] = forward_graph, both_graph
            else:
                runs[contender.name] = pair
                launched |= {contender.name} if graphs else set()
    for _ in range(rounds):
        for name, (run_forward, run_both) in runs.items():
            times[name].append((_milliseconds(run_forward, device), _milliseconds(run_both, device)))
    for name, pairs in times.items():
        forwards, together = (list(column) for column in zip(*pairs, strict=True))
        results[name] = OpTime(
            statistics.median(forwards),
            statistics.median(together),
            (min(together), max(together)),
            memory[name],
            with_launches=name in launched,
        )
    return results


def machine(device: torch.device) -> str:
    """Hardware and versions, for the line above a table."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        name = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpu_info.read_text(encoding="utf-8").splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {platform.python_implementation()} {platform.python_version()}, torch {torch.__version__}"


def table(subject: Subject, results: dict[str, OpTime], ceiling: Ceilings) -> str:
    """Markdown; the first contender is what the others are divided by."""
    floor, first = ceiling.floor_ms(subject), subject.contenders[0].name
    lines = [
        f"{subject.title}; floor {floor:.2f} ms",
        "",
        f"| backend | forward ms | both ms (min–max) | {first} / it | floor / it | extra memory MB |",
        "|---|---|---|---|---|---|",
    ]
    base = results[first]
    for contender in subject.contenders:
        result = results[contender.name]
        name = f"**{contender.name}**" if contender.ours else contender.name
        if result.problem:
            lines.append(f"| {name} | {result.problem} | | | | |")
            continue
        name += ", with launches" if result.with_launches else ""
        ratio = "–" if base.problem else f"{base.both / result.both:.1f}×"
        memory = "–" if result.extra_megabytes is None else f"{result.extra_megabytes:,.0f}"
        both = f"{result.both:.2f} ({result.spread[0]:.2f}–{result.spread[1]:.2f})"
        lines.append(f"| {name} | {result.forward:.2f} | {both} | {ratio} | {floor / result.both:.0%} | {memory} |")
    return "\n".join(lines)


def main(args: list[str]) -> None:
    """`hymba study ops`. Exits with 1 where a backend differs from the definition."""
    parser = StudyParser(
        "ops",
        "A backend whose output or gradients differ from the naive definition is not timed, and the exit status is 1. "
        "Example: hymba study ops --device cpu --threads 1 --only scan --rounds 9",
    )
    parser.add_argument(
        "--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads, a table each (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="Timed rounds of which the median is taken")
    parser.add_argument("--only", choices=OPS, nargs="+", default=list(OPS), help="These ops only")
    options = parser.read(args)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    wrong = False
    for threads in options.threads or ([torch.get_num_threads()] if on_gpu else [1, 2]):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        ceiling = ceilings(device, dtype)
        print(
            f"\n{machine(device)}, {threads} threads, {dtype}, {source_version()}, median of {options.rounds}; "
            f"copy {ceiling.copy_gb_per_s:.0f} GB/s, matmul {ceiling.matmul_tflops:.3g} TFLOP/s"
        )
        for make in (make for op in options.only for make in subjects(op, device, dtype)):
            subject = make()
            results = time_subject(subject, options.rounds if subject.length <= 4096 or on_gpu else 3)
            wrong |= any(result.problem for result in results.values())
            print(f"\n{table(subject, results, ceiling)}", flush=True)
    if wrong:
        sys.exit(1)
