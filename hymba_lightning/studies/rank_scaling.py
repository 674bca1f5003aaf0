"""What several GPUs of one host give: the training step on 1, 2, 4 … ranks at the same tokens a rank.

Every rank makes the step of `hymba fit`: forward and backward (recorded on a GPU), one mean of all gradients over the
ranks, the optimizer with its products shared among them. The ranks compile once and then form groups of each size.

Source of the model of a reduction: a ring sends 2 (n − 1) / n of the payload through each rank's link (NCCL's own
"bus bandwidth", nccl-tests, doc/PERFORMANCE.md), after n − 1 waits.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from hymba_lightning.files import write_atomic
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.gradients import CALLS_BEFORE_RECORDING, Gradients
from hymba_lightning.ops.compiling import compiled
from hymba_lightning.options import read_help
from hymba_lightning.studies.arguments import StudyParser, source_version
from hymba_lightning.studies.rank_processes import run_ranks
from hymba_lightning.studies.rank_trace import draw, on_the_gpu
from hymba_lightning.studies.runs import read_json
from hymba_lightning.studies.step_time import Stopwatch
from hymba_lightning.training.graphed import average_over_ranks, start_gradients
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer

PROFILED_STEPS = 3
REDUCTIONS = 30


@dataclass(frozen=True)
class Request:
    """What the ranks are to do."""

    ranks: list[int]
    """Sizes of groups, rising."""
    accumulate: list[int]
    """Micro-batches of a step, each on its own."""
    seq_len: int
    tokens: int
    """Of a rank's micro-batch, a multiple of `seq_len`."""
    steps: int
    """Timed, of which the median is kept."""
    warmup: int
    compile: bool
    trace: bool
    device: str
    """cuda or cpu."""
    net: dict[str, Any]
    runtime: dict[str, Any]
    optimizer: dict[str, Any]
    out: str
    """Folder of what the ranks leave."""


@dataclass(frozen=True)
class RankTime:
    """Medians of rank 0 in milliseconds."""

    ranks: int
    accumulate: int
    total: float
    shortest: float
    longest: float
    gradient: float
    """Forward and backward of all micro-batches."""
    reduction: float
    """The mean of the gradients over the ranks, in the step: with the wait for the slowest."""
    optimizer: float
    """With the exchange of what other ranks computed."""
    reduction_alone: float
    """The same mean, nothing else going on."""
    latency: float
    """A mean of one number."""
    payload: int
    """Bytes of all gradients."""
    tokens: int
    """Of a step on all ranks."""

    @property
    def tokens_per_s(self) -> float:
        """All ranks' tokens over the step's time."""
        return 1000 * self.tokens / self.total


class _Step:
    """One rank's network, optimizer and random tokens."""

    def __init__(self, request: Request, device: torch.device) -> None:
        torch.manual_seed(0)  # every rank has the same weights, as under DDP
        net = Hymba(HymbaConfig(**request.net), RuntimeConfig(**request.runtime)).to(device)
        self.optimizer = build_optimizer(net, OptimizerConfig(**request.optimizer))
        forward: Callable[..., Tensor] = net
        if request.compile:
            forward = compiled(net.forward, dynamic=False)
        self.gradients: Gradients = start_gradients([self.optimizer], forward, list(net.parameters()))
        ids = torch.randint(0, net.config.vocab_size, (request.tokens // request.seq_len, request.seq_len + 1))
        ids = ids.to(device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.device = device

    def make(self, accumulate: int) -> Stopwatch:
        """One step; its marks stand around forward and backward, the reduction and the optimizer."""
        watch = Stopwatch(self.device)
        watch.mark()
        with record_function("forward and backward"):
            for _ in range(accumulate):
                self.gradients.add(self.inputs, self.targets, 1 / accumulate)
        watch.mark()
        with record_function("mean over the ranks"):
            average_over_ranks(self.gradients.flat)
        watch.mark()
        with record_function("optimizer"):
            self.optimizer.step()
        watch.mark()
        return watch


def _median_reduction(tensors: list[Tensor], device: torch.device) -> float:
    """Milliseconds of their mean over the ranks, from a common start."""
    watches = []
    for _ in range(REDUCTIONS):
        dist.barrier()
        watch = Stopwatch(device)
        watch.mark()
        average_over_ranks(tensors)
        watch.mark()
        watches.append(watch)
    return statistics.median(watch.pieces()[0] for watch in watches[REDUCTIONS // 3 :])


def _time_group(step: _Step, request: Request, size: int, accumulate: int) -> RankTime:
    for _ in range(request.warmup):
        step.make(accumulate)
    watches = [step.make(accumulate) for _ in range(request.steps)]
    times = [watch.pieces() for watch in watches]
    totals = [sum(pieces) for pieces in times]
    gradient, reduction, optimizer = (statistics.median(column) for column in zip(*times, strict=True))
    alone = latency = 0.0
    if size > 1:
        flat = [torch.zeros_like(sums) for sums in step.gradients.flat]
        alone = _median_reduction(flat, step.device)
        latency = _median_reduction([torch.zeros(1, device=step.device)], step.device)
    return RankTime(
        ranks=size,
        accumulate=accumulate,
        total=statistics.median(totals),
        shortest=min(totals),
        longest=max(totals),
        gradient=gradient,
        reduction=reduction,
        optimizer=optimizer,
        reduction_alone=alone,
        latency=latency,
        payload=sum(sums.numel() * sums.element_size() for sums in step.gradients.flat),
        tokens=size * accumulate * request.tokens,
    )


def _trace(step: _Step, path: Path | None) -> None:
    """Makes some steps; the rank with a path profiles them, for Perfetto or chrome://tracing."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if step.device.type == "cuda" else [])]
    with nullcontext() if path is None else profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            step.make(1)
        if step.device.type == "cuda":
            torch.cuda.synchronize()
    if path is not None and profiled is not None:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(raw))
            write_atomic(path, gzip.compress(raw.read_bytes(), mtime=0))


def work(rank: int, request: Request) -> None:
    """One rank: compiles its step, then makes it in every group that it belongs to. Rank 0 leaves `times.json`."""
    cuda = request.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // request.ranks[-1]))
    step = _Step(request, device)
    for _ in range(CALLS_BEFORE_RECORDING + 1):
        step.make(1)
    out, times = Path(request.out), []
    for size in request.ranks:
        if rank >= size:
            continue
        if size > 1:
            dist.init_process_group(
                "nccl" if cuda else "gloo", init_method=f"file://{out}/group-{size}", rank=rank, world_size=size
            )
        for accumulate in request.accumulate:
            times.append(asdict(_time_group(step, request, size, accumulate)))
        if request.trace and size == request.ranks[-1]:
            _trace(step, out / "trace.json.gz" if rank == 0 else None)
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
        gc.collect()
        if rank == 0:
            write_atomic(out / "times.json", json.dumps(times, indent=1) + "\n")


def measure(request: Request) -> list[RankTime]:
    """Starts the ranks and waits for them.

    Raises:
        ValueError: a number is out of range, the sizes do not rise, the tokens are no multiple of `seq_len`, there is
            no such network, or a rank was killed.
        OSError: nothing can be written to `out`.
        RuntimeError: a rank failed; it names it, and the rank's traceback is its cause. The others are ended.
    """
    for name, least, values in (
        ("accumulate", 1, request.accumulate),
        ("seq_len", 1, [request.seq_len]),
        ("tokens", 1, [request.tokens]),
        ("steps", 1, [request.steps]),
        ("warmup", 0, [request.warmup]),
    ):
        if min(values) < least:
            raise ValueError(f"--{name} must be at least {least}, got {min(values)}")
    if request.ranks[0] < 1 or request.ranks != sorted(set(request.ranks)):
        raise ValueError(f"--ranks must rise from 1 or more, got {request.ranks}")
    if request.tokens % request.seq_len:
        raise ValueError(f"{request.tokens} tokens a micro-batch are no multiple of seq_len {request.seq_len}")
    HymbaConfig(**request.net), RuntimeConfig(**request.runtime), OptimizerConfig(**request.optimizer)
    out = Path(request.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder, which is made if there is none")
    out.mkdir(parents=True, exist_ok=True)
    # What was measured for minutes must find room there.
    with tempfile.TemporaryFile(dir=out):
        pass
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(work, Request(**asdict(request) | {"out": folder}), request.ranks[-1])
        for path in sorted(Path(folder).glob("*.json*")):
            write_atomic(out / path.name, path.read_bytes())
    return [RankTime(**row) for row in read_json(out / "times.json", list)]


def predict(times: Sequence[RankTime], ranks: int) -> tuple[float, float]:
    """(step, reduction) in milliseconds on so many ranks of one host, from measurements on one and on several.

    Forward and backward take what they take on one rank; the reduction its waits and its bytes over the bandwidth of
    the largest group measured; the optimizer what it took there. Raises ValueError without both measurements.
    """
    alone = [time for time in times if time.ranks == 1]
    groups = [time for time in times if time.ranks > 1]
    if not alone or not groups:
        raise ValueError("a prediction needs the step on one rank and on several")
    one, most = alone[0], max(groups, key=lambda time: time.ranks)
    sent = 2 * (most.ranks - 1) / most.ranks * most.payload
    bytes_per_ms = sent / max(most.reduction_alone - most.latency, 1e-6)
    waits = most.latency * (ranks - 1) / (most.ranks - 1)
    reduction = waits + 2 * (ranks - 1) / ranks * most.payload / bytes_per_ms
    return one.gradient + reduction + most.optimizer, reduction


def table(times: Sequence[RankTime], predicted: Sequence[int] = ()) -> str:
    """Markdown: every group, efficiency against one rank with as many micro-batches, then what is predicted."""
    rows = [
        "| ranks | micro-batches a step | ms/step (min–max) | forward and backward | mean over ranks (alone) "
        "| optimizer | tokens/s | efficiency |",
        "|---" * 8 + "|",
    ]
    single = {time.accumulate: time.total for time in times if time.ranks == 1}
    for time in times:
        efficiency = f"{single[time.accumulate] / time.total:.3f}" if time.accumulate in single else "–"
        rows.append(
            f"| {time.ranks} | {time.accumulate} | {time.total:.2f} ({time.shortest:.2f}–{time.longest:.2f}) "
            f"| {time.gradient:.2f} | {time.reduction:.2f} ({time.reduction_alone:.2f}) | {time.optimizer:.2f} "
            f"| {time.tokens_per_s:,.0f} | {efficiency} |"
        )
    first = [time for time in times if time.accumulate == times[0].accumulate]
    for ranks in predicted:
        total, reduction = predict(first, ranks)
        tokens = first[0].tokens // first[0].ranks * ranks
        rows.append(
            f"| {ranks}, predicted | {first[0].accumulate} | {total:.2f} | {first[0].gradient:.2f} | {reduction:.2f} "
            f"| {max(first, key=lambda time: time.ranks).optimizer:.2f} | {1000 * tokens / total:,.0f} "
            f"| {first[0].total / total:.3f} |"
        )
    most = max(times, key=lambda time: time.ranks)
    if most.ranks > 1:
        rate = 2 * (most.ranks - 1) / most.ranks * most.payload / most.reduction_alone / 1e6
        rows += [
            "",
            f"Gradients of {most.payload / 1e6:.1f} MB; their mean over {most.ranks} ranks alone runs at {rate:.3g} "
            f"GB/s a link, a mean of one number takes {1000 * most.latency:.0f} µs.",
        ]
    return "\n".join(rows) + "\n"


def main(args: list[str]) -> None:
    """`hymba study ranks`."""
    read_help(args)
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    parser = StudyParser(
        "ranks",
        "Without Lightning and the loader around it, on random tokens. Writes table.md, times.json and, with --trace, "
        "trace.json.gz (for Perfetto) and trace.png. Example, on a CPU: hymba study ranks --out runs/ranks --ranks 1 2 "
        "--seq_len 1024 --tokens 1024 --steps 3 --compile false --net.d_model 96 --net.n_layers 2",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the table and the trace")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[n for n in (1, 2, 4, 8) if n <= there or n == 1],
        help="Sizes of groups",
    )
    parser.add_argument("--predict", type=int, nargs="*", default=[], help="Sizes to predict from those, as 8")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2], help="Micro-batches of a step")
    parser.add_argument("--seq_len", type=int, default=32768, help="Tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=65536, help="Tokens of a rank's micro-batch")
    parser.add_argument("--steps", type=int, default=30, help="Steps that are timed, of which the median is shown")
    parser.add_argument("--warmup", type=int, default=5, help="Steps before, in every group")
    parser.add_argument("--compile", type=bool, default=True, help="As model.compile of `hymba fit`")
    parser.add_argument("--trace", type=bool, default=cuda, help="Profile some steps of the largest group")
    parser.add_class_arguments(HymbaConfig, "net")
    parser.add_class_arguments(RuntimeConfig, "runtime")
    parser.add_class_arguments(OptimizerConfig, "optimizer")
    parser.set_defaults({"runtime.compute_dtype": "bfloat16" if cuda else "float32"})
    given = parser.read(args)
    if cuda and max(given.ranks) > there:
        raise ValueError(f"--ranks asks for {max(given.ranks)} GPUs, and there are {there}")
    if given.predict and (1 not in given.ranks or max(given.ranks) == 1):
        raise ValueError("--predict needs the step on one rank and on several: give --ranks 1 and a larger size")
    out = Path(given.out)
    request = Request(
        ranks=given.ranks,
        accumulate=given.accumulate,
        seq_len=given.seq_len,
        tokens=given.tokens,
        steps=given.steps,
        warmup=given.warmup,
        compile=given.compile,
        trace=given.trace,
        device="cuda" if cuda else "cpu",
        net=dict(given.net),
        runtime=dict(given.runtime),
        optimizer=dict(given.optimizer),
        out=str(out),
    )
    times = measure(request)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    head = (
        f"{device}, torch {torch.__version__}, {source_version()}, {given.tokens:,} tokens a rank and micro-batch, "
        f"sequences of {given.seq_len:,}, {given.steps} steps"
    )
    text = f"{head}\n\n{table(times, given.predict)}"
    if given.trace and cuda:
        spans = on_the_gpu(json.loads(gzip.decompress((out / "trace.json.gz").read_bytes())))
        text += f"\n{draw(spans, f'{given.ranks[-1]} × {device}, rank 0', out / 'trace.png')}\n"
    write_atomic(out / "table.md", text)
    print(text, end="")
