"""How long one training step takes, and where: forward, backward, optimizer, average.

The step is the one that `hymba fit` makes by default on that device, so compiled and from a CUDA graph on a GPU."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_lightning.callbacks.stats import device_peak_tflops, peak_memory_gb
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.costs import train_flops_per_token
from hymba_lightning.model.gradients import CALLS_BEFORE_RECORDING
from hymba_lightning.ops.compiling import compiled
from hymba_lightning.options import read_help
from hymba_lightning.studies.arguments import StudyParser, source_version
from hymba_lightning.training.graphed import start_gradients, uses_cuda_graph
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer
from hymba_lightning.training.pages import keep_pages


@dataclass(frozen=True)
class StepTime:
    """Medians over the timed steps, in milliseconds; memory in 10^9 bytes."""

    seq_len: int
    tokens: int
    graph: bool
    """Forward and backward were replayed from a CUDA graph."""
    total: float
    spread: tuple[float, float]
    """The shortest and the longest step."""
    gradient: float
    """Forward and backward."""
    forward: float | None
    """Forward alone, None where both are one call."""
    optimizer: float
    average: float
    memory_gb: float
    mfu: float | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its time."""
        return 1000 * self.tokens / self.total


class Stopwatch:
    """Times the pieces of a step with CUDA events, or the host's clock where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.seconds: list[float] = []

    def mark(self) -> None:
        """The end of one piece and the beginning of the next."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.seconds.append(time.perf_counter())

    def pieces(self) -> list[float]:
        """Milliseconds between consecutive marks, after the GPU has reached the last one."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]
        return [1000 * (b - a) for a, b in zip(self.seconds, self.seconds[1:], strict=False)]


def measure(
    config: HymbaConfig,
    runtime: RuntimeConfig,
    seq_len: int,
    tokens: int,
    *,
    device: torch.device,
    compile_net: bool,
    n_steps: int,
    warmup: int,
    cuda_graph: bool | None = None,
    optimizer_config: OptimizerConfig | None = None,
) -> StepTime:
    """Trains on random tokens and times all steps after the first `warmup`. Frees what it took.

    Args:
        config: Of the network that is trained, from random weights.
        runtime: How it is executed.
        seq_len: Tokens of a sequence.
        tokens: Tokens of a step, which is one micro-batch.
        device: Where.
        compile_net: As `model.compile` of `hymba fit`.
        n_steps: Steps that are timed.
        warmup: Steps before; with a CUDA graph at least as many as it takes to record one.
        cuda_graph: As `model.cuda_graph` of `hymba fit`; None for yes on a GPU with `compile_net`.
        optimizer_config: None for the default.

    Raises:
        ValueError: `tokens` is no multiple of `seq_len`, or a CUDA graph is wanted on a CPU.
        GraphRecordingError: the step cannot be recorded.
    """
    if tokens % seq_len:
        raise ValueError(f"{tokens} tokens a step are no multiple of seq_len {seq_len}")
    obstacle = None if device.type == "cuda" else f"the network is on {device}"
    graphed = uses_cuda_graph(obstacle, cuda_graph, compile_net)
    if device.type == "cpu":
        keep_pages()
    torch.manual_seed(0)
    net = Hymba(config, runtime).to(device)
    optimizer = build_optimizer(net, optimizer_config or OptimizerConfig())
    parameters = [p.detach() for p in net.parameters()]
    shadow = [p.float().clone() for p in parameters]
    forward: Callable[..., Tensor] = net
    if compile_net:
        torch.compiler.reset()  # what was compiled for another length is not wanted here
        forward = compiled(net.forward, dynamic=False)
    gradients = start_gradients([optimizer], forward, list(net.parameters())) if graphed else None
    if graphed:
        warmup = max(warmup, CALLS_BEFORE_RECORDING + 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(0, config.vocab_size, (tokens // seq_len, seq_len + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    watches = []
    for _ in range(warmup + n_steps):
        watch = Stopwatch(device)
        watch.mark()
        if gradients is None:
            loss = forward(inputs, targets)
            watch.mark()
            loss.backward()
        else:
            gradients.add(inputs, targets)
        watch.mark()
        optimizer.step()
        if gradients is None:
            optimizer.zero_grad(set_to_none=True)
        watch.mark()
        with torch.no_grad():
            torch._foreach_lerp_(shadow, parameters, 0.003)
        watch.mark()
        watches.append(watch)
    # Read only now: a wait for the GPU after each step would add the time in which the next one is launched.
    times = [watch.pieces() for watch in watches[warmup:]]
    totals = [sum(pieces) for pieces in times]
    total = statistics.median(totals)
    peak = device_peak_tflops(device)
    flops = tokens * train_flops_per_token(net, seq_len)
    *parts, update, average = (statistics.median(column) for column in zip(*times, strict=True))
    result = StepTime(
        seq_len=seq_len,
        tokens=tokens,
        graph=gradients is not None and bool(gradients.shapes_recorded),
        total=total,
        spread=(min(totals), max(totals)),
        gradient=statistics.median(sum(pieces[:-2]) for pieces in times),
        forward=parts[0] if gradients is None else None,
        optimizer=update,
        average=average,
        memory_gb=peak_memory_gb(device),
        mfu=flops / (total / 1000) / (peak * 1e12) if peak else None,
    )
    del net, optimizer, shadow, parameters, forward, gradients
    if device.type == "cuda":
        gc.collect()  # a recorded graph keeps its memory as long as anything points to it
        torch.cuda.empty_cache()
    return result


def header(device: torch.device) -> str:
    """The hardware and versions, and the head of the markdown table whose rows `row` gives."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return "\n".join(
        [
            f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            "",
            "| seq_len | tokens a step | CUDA graph | ms/step (min–max) | forward and backward | forward | optimizer "
            "| average | tokens/s | MFU | memory |",
            "|---" * 11 + "|",
        ]
    )


def row(time: StepTime) -> str:
    """One measurement as a line of the table."""
    mfu = f"{time.mfu:.1%}" if time.mfu is not None else "–"
    forward = f"{time.forward:.1f}" if time.forward is not None else "–"
    cells = [
        f"{time.seq_len:,}",
        f"{time.tokens:,}",
        "yes" if time.graph else "no",
        f"{time.total:.1f} ({time.spread[0]:.1f}–{time.spread[1]:.1f})",
        f"{time.gradient:.1f}",
        forward,
        f"{time.optimizer:.1f}",
        f"{time.average:.1f}",
        f"{time.tokens_per_s:,.0f}",
        mfu,
        f"{time.memory_gb:.1f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def main(args: list[str]) -> None:
    """`hymba study step`."""
    read_help(args)
    cuda = torch.cuda.is_available()
    parser = StudyParser(
        "step",
        "The step is what `hymba fit` does on this device with model.compile, on random tokens, without Lightning and "
        "the loader around it: on a GPU in bfloat16 and with forward and backward replayed from a CUDA graph. "
        "Example, on a CPU: hymba study step --seq_len 4096 --tokens 4096 --steps 3 --compile false",
    )
    parser.add_argument(
        "--seq_len", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="Lengths, a row each"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="Tokens of a step, a multiple of each length")
    parser.add_argument("--steps", type=int, default=20, help="Steps that are timed, of which the median is shown")
    parser.add_argument("--warmup", type=int, default=8, help="Steps before")
    parser.add_argument("--compile", type=bool, default=True, help="As model.compile of `hymba fit`")
    parser.add_argument(
        "--cuda_graph",
        type=bool | None,
        default=None,
        help="As model.cuda_graph of `hymba fit`; null for yes on a GPU with --compile",
    )
    parser.add_class_arguments(HymbaConfig, "net")
    parser.add_class_arguments(RuntimeConfig, "runtime")
    parser.add_class_arguments(OptimizerConfig, "optimizer")
    parser.set_defaults({"runtime.compute_dtype": "bfloat16" if cuda else "float32"})
    options = parser.read(args)
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{source_version()}, {options.steps} steps each, compiled: {'yes' if options.compile else 'no'}")
    print(header(device), flush=True)
    for seq_len in options.seq_len:
        time = measure(
            HymbaConfig(**options.net),
            RuntimeConfig(**options.runtime),
            seq_len,
            options.tokens,
            device=device,
            compile_net=options.compile,
            n_steps=options.steps,
            warmup=options.warmup,
            cuda_graph=options.cuda_graph,
            optimizer_config=OptimizerConfig(**options.optimizer),
        )
        print(row(time), flush=True)
