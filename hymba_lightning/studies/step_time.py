"""How long one training step takes, and where: forward, backward, optimizer, average."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_lightning.callbacks.stats import device_peak_tflops, peak_memory_gb
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.costs import train_flops_per_token
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer


@dataclass(frozen=True)
class StepTime:
    """Medians over the timed steps, in milliseconds."""

    seq_len: int
    tokens: int
    total: float
    spread: tuple[float, float]
    forward: float
    backward: float
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
        """Milliseconds between the marks; waits for the GPU."""
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
) -> StepTime:
    """Trains `warmup` + `n_steps` steps on random tokens and times the latter. Frees what it took.

    Raises ValueError when `tokens` is not a multiple of `seq_len`.
    """
    if tokens % seq_len:
        raise ValueError(f"{tokens} tokens a step are no multiple of seq_len {seq_len}")
    torch.manual_seed(0)
    net = Hymba(config, runtime).to(device)
    optimizer = build_optimizer(net, OptimizerConfig())
    parameters = [p.detach() for p in net.parameters()]
    shadow = [p.float().clone() for p in parameters]
    if compile_net:
        torch.compiler.reset()  # what was compiled for another length is not wanted here
        net.compile(dynamic=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    inputs = torch.randint(0, config.vocab_size, (tokens // seq_len, seq_len + 1), device=device)
    watches = []
    for _ in range(warmup + n_steps):
        watches.append(Stopwatch(device))
        one_step(net, optimizer, inputs, parameters, shadow, watches[-1])
    # Read only now: a wait for the GPU after each step would add the time in which the next one is launched.
    times = [watch.pieces() for watch in watches[warmup:]]
    totals = [sum(pieces) for pieces in times]
    total = statistics.median(totals)
    peak = device_peak_tflops(device)
    flops = tokens * train_flops_per_token(net, seq_len)
    forward, backward, update, average = (statistics.median(column) for column in zip(*times, strict=True))
    result = StepTime(
        seq_len,
        tokens,
        total,
        (min(totals), max(totals)),
        forward,
        backward,
        update,
        average,
        peak_memory_gb(device),
        flops / (total / 1000) / (peak * 1e12) if peak else None,
    )
    del net, optimizer, shadow, parameters
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def one_step(
    net: Hymba,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    parameters: list[Tensor],
    shadow: list[Tensor],
    watch: Stopwatch,
) -> None:
    """One step as the trainer makes it, with a mark before and after forward, backward, optimizer and average."""
    watch.mark()
    loss = net(inputs[:, :-1], inputs[:, 1:])
    watch.mark()
    loss.backward()
    watch.mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.mark()
    with torch.no_grad():
        torch._foreach_lerp_(shadow, parameters, 0.003)
    watch.mark()


def header(device: torch.device) -> str:
    """The hardware and versions, and the head of the markdown table whose rows `row` gives."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return "\n".join(
        [
            f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            "",
            "| seq_len | tokens a step | ms/step (min–max) | forward | backward | optimizer | average "
            "| tokens/s | MFU | memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    )


def row(time: StepTime) -> str:
    """One measurement as a line of the table."""
    mfu = f"{time.mfu:.1%}" if time.mfu is not None else "–"
    spread = f"{time.spread[0]:.1f}–{time.spread[1]:.1f}"
    return (
        f"| {time.seq_len:,} | {time.tokens:,} | {time.total:.1f} ({spread}) | {time.forward:.1f} "
        f"| {time.backward:.1f} | {time.optimizer:.1f} | {time.average:.1f} | {time.tokens_per_s:,.0f} | {mfu} "
        f"| {time.memory_gb:.1f} GB |"
    )
