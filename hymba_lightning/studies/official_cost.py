"""Memory and speed of the released Hymba models' shape with random weights, which cost what trained ones do."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from hymba_lightning.evaluation.carried import read
from hymba_lightning.generation.steps import Steps
from hymba_lightning.interop.official import preset, with_bfloat16_matrices
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.long_generation import state_bytes

MIB = 2**20


class Cost(NamedTuple):
    """One batch of prompts of one length."""

    batch: int
    prompt: int
    read_seconds: float  # of the second reading: the first compiles
    ms_per_step: float  # median; a step draws one token for each row
    weights_bytes: int
    state_bytes: int
    peak_bytes: int  # allocated on the device; 0 on a CPU


def random_network(
    device: torch.device, compute_dtype: str, config: HymbaConfig | None = None, step_graphs: bool = True
) -> Hymba:
    """The preset's network, or `config`'s; its matrices are stored in the dtype that is computed in."""
    torch.manual_seed(0)
    with device:
        net = Hymba(config or preset(), RuntimeConfig(compute_dtype=compute_dtype, step_graphs=step_graphs))
    if compute_dtype == "bfloat16":
        with_bfloat16_matrices(net)
    return net.eval()


@torch.no_grad()
def measure(net: Hymba, batch: int, prompt: int, new_tokens: int, piece_tokens: int) -> Cost:
    """Reads `batch` random prompts in pieces and continues each greedily by `new_tokens`."""
    device = net.tok_emb.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, net.config.vocab_size, (batch, prompt), generator=generator).to(device)
    state: HymbaState | None = None
    seconds = 0.0
    for _ in range(2):
        state = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = _now(device)
        logits_BV, state = read(net, ids, None, piece_tokens)
        seconds = _now(device) - started
    assert state is not None
    size, times = state_bytes(state), []
    steps, state = Steps(net, state), None
    for _ in range(new_tokens):
        started = _now(device)
        logits_BV = steps.read(logits_BV.argmax(-1, keepdim=True), piece_tokens)
        times.append(1000 * (_now(device) - started))
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Cost(batch, prompt, seconds, statistics.median(times), weights, size, peak)


def measure_all(
    net: Hymba, batches: Iterable[int], prompts: Iterable[int], new_tokens: int, piece_tokens: int
) -> Iterator[Cost]:
    """`measure` of each pair; what does not fit into the device's memory is left out."""
    prompts = list(prompts)
    for batch in batches:
        for prompt in prompts:
            try:
                yield measure(net, batch, prompt, new_tokens, piece_tokens)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()


def table(costs: Iterable[Cost]) -> str:
    """Markdown."""
    lines = [
        "| batch | prompt | prompt read | ms per step | new tokens/s | weights | state | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        rate = cost.batch * cost.prompt / cost.read_seconds
        memory = " | ".join(f"{n / MIB:,.0f} MiB" for n in (cost.weights_bytes, cost.state_bytes, cost.peak_bytes))
        lines.append(
            f"| {cost.batch} | {cost.prompt:,} | {cost.read_seconds:.2f} s ({rate:,.0f} tokens/s) | "
            f"{cost.ms_per_step:.1f} | {1000 * cost.batch / cost.ms_per_step:,.0f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main(args: list[str]) -> None:
    """`hymba study released`."""
    parser = StudyParser("released", "Prompts of random tokens are read in pieces and continued greedily.")
    parser.add_argument("--device", type=str, default="cuda", help="cuda or cpu")
    parser.add_argument(
        "--compute_dtype", type=str, default="bfloat16", help="bfloat16 or float32; matrices are stored so"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="Rows")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8_192, 32_768], help="Tokens of a row's prompt")
    parser.add_argument("--new_tokens", type=int, default=50, help="Tokens drawn for each row")
    parser.add_argument("--piece_tokens", type=int, default=2_048, help="Tokens of a row that are read in one pass")
    parser.add_argument(
        "--layers", type=int, default=0, help="So many layers that share nothing, for a try; 0: the model's 32"
    )
    parser.add_argument("--step_graphs", type=bool, default=True, help="On a GPU, tokens by a CUDA graph once recorded")
    options = parser.read(args)
    config = preset()
    if options.layers:
        config = dataclasses.replace(config, n_layers=options.layers, kv_groups=None, global_layers=[0])
    device = torch.device(options.device)
    net = random_network(device, options.compute_dtype, config, options.step_graphs)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    weights = sum(p.numel() for p in net.parameters())
    print(f"{weights:,} weights, {options.compute_dtype}, torch {torch.__version__}, {where}\n", flush=True)
    costs = measure_all(net, options.batches, options.prompts, options.new_tokens, options.piece_tokens)
    print(table(costs), end="")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
