"""Time and memory of generation against the length of the context: both should not depend on it."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.evaluation.carried import read
from hymba_lightning.generation.loading import load_network
from hymba_lightning.generation.steps import Steps
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.studies.arguments import StudyParser

# Of the demo, without its training: the time and the memory are the same.
UNTRAINED = HymbaConfig(
    n_layers=4,
    d_model=192,
    n_heads=6,
    n_kv_heads=2,
    window=256,
    mlp_mult=3,
    bigram_buckets=2048,
    bigram_dim=64,
)


class LengthResult(NamedTuple):
    """One length of context."""

    context: int
    read_seconds: float  # since the length before
    ms_per_token: float  # median
    state_bytes: int
    peak_rss_mib: float  # of the process so far


def state_bytes(state: HymbaState) -> int:
    """Memory that a state keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors()}.values())


def measure(
    net: Hymba, lengths: list[int], n_new: int, prefill_tokens: int = 2048, tokens: Tensor | None = None
) -> Iterator[LengthResult]:
    """Reads a context (random tokens by default) and, at each of the rising lengths, draws `n_new` tokens greedily.

    The tokens drawn are not kept: each length goes on from the one before. Raises ValueError for lengths that do not
    rise.
    """
    if lengths != sorted(set(lengths)):
        raise ValueError(f"the lengths must rise, got {lengths}")
    device = net.tok_emb.weight.device
    if tokens is None:
        tokens = torch.randint(0, net.config.vocab_size, (lengths[-1],), generator=torch.Generator().manual_seed(0))
    net.eval()
    state, done = None, 0
    for length in lengths:
        started = time.monotonic()
        logits_BV, state = read(net, tokens[None, done:length].to(device), state, prefill_tokens)
        reading, done = time.monotonic() - started, length
        steps, times = Steps(net, state), []
        for _ in range(n_new):
            started = time.monotonic()
            logits_BV = steps.read(logits_BV.argmax(-1, keepdim=True), 1)
            float(logits_BV[0, 0])
            times.append(1000 * (time.monotonic() - started))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        after = steps.state
        assert after is not None
        yield LengthResult(length, reading, statistics.median(times), state_bytes(after), peak)


def table(results: list[LengthResult]) -> str:
    """Markdown."""
    rows = [
        "| tokens of context | ms per new token | state | peak memory of the process | read at |",
        "|---|---|---|---|---|",
    ]
    before = 0
    for result in results:
        rate = (result.context - before) / result.read_seconds
        before = result.context
        rows.append(
            f"| {result.context:,} | {result.ms_per_token:.2f} | {result.state_bytes / 1024:,.0f} KiB | "
            f"{result.peak_rss_mib:,.0f} MiB | {rate:,.0f} tokens/s |"
        )
    return "\n".join(rows) + "\n"


def main(args: list[str]) -> None:
    """`hymba study generation`."""
    parser = StudyParser("generation", "The context is random tokens.")
    parser.add_argument(
        "--ckpt_path", type=str, help="Artifact or checkpoint (default: an untrained network like the demo's)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="Tokens of context")
    parser.add_argument("--new_tokens", type=int, default=100, help="Tokens drawn at each, whose median time is shown")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--compute_dtype", type=str, default="float32", help="float32 or bfloat16")
    parser.add_argument("--step_graphs", type=bool, default=True, help="On a GPU, tokens by a CUDA graph once recorded")
    options = parser.read(args)
    runtime = RuntimeConfig(compute_dtype=options.compute_dtype, step_graphs=options.step_graphs)
    device = torch.device(options.device)
    if options.ckpt_path is None:
        net = Hymba(UNTRAINED, runtime).to(device)
    else:
        net = load_network(options.ckpt_path, runtime, device)[0]
    print(table(list(measure(net, options.lengths, options.new_tokens))), end="")
