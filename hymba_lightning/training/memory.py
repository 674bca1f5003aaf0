"""How much memory a training step needs, estimated before it is tried: the system kills a process without a message.

The counts of activations were read off a step's saved tensors (`torch.autograd.graph.saved_tensors_hooks`) on the CPU,
where nothing is fused; a compiled network on a GPU needs less.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from hymba_lightning.errors import UserError
from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.model.costs import matmul_params
from hymba_lightning.model.hymba import outline

log = logging.getLogger("hymba_lightning")

GIB = 2**30
# Over this share of what is free an estimate is a warning; beyond the second it is an error.
TIGHT, IMPOSSIBLE = 0.8, 1.2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs beyond what the program itself takes."""

    weights: int
    """Weights, gradients, optimizer state, average, and the copies that undo the warm-up steps."""
    activations: int
    """What the backward pass needs of the forward pass, and its largest intermediate results."""

    @property
    def total(self) -> int:
        """Of everything that is there at the peak."""
        return self.weights + self.activations


def estimate_memory(
    net: HymbaConfig,
    runtime: RuntimeConfig,
    seq_len: int,
    micro_batch_size: int,
    *,
    averaged: bool = True,
    warmup: bool = True,
) -> MemoryEstimate:
    """The peak of a training step.

    Args:
        net: Architecture.
        runtime: Dtype and recomputation.
        seq_len: Tokens T of a sequence.
        micro_batch_size: Sequences B per pass.
        averaged: Whether a moving average of the weights is kept.
        warmup: Whether steps are run and undone first, for which weights and optimizer state are copied.
    """
    d, layers = net.d_model, net.n_layers
    network = outline(net)
    mixers = [block.attn for block in network.layers]
    kv = net.n_kv_heads * (net.head_dim + net.value_dim)
    tables = net.vocab_size * d * (1 if net.tie_embeddings else 2)
    tables += net.bigram_buckets * net.bigram_dim if net.bigram_hash else 0
    matrices = max(matmul_params(network) - d * net.vocab_size, 0)
    fused = sum(linear.weight.numel() for mixer in mixers for linear in mixer.joined())
    # Muon keeps one momentum, Adam two.
    state = matrices + 2 * tables
    weights = 2 * (matrices + tables) + state
    weights += (matrices + tables) if averaged else 0
    weights += (matrices + tables + state) if warmup else 0
    weights += fused

    tokens = (seq_len + net.meta_tokens) * micro_batch_size
    size = 2 if runtime.compute_dtype == "bfloat16" else 4
    # In float32 a CPU's MLP keeps what its first product gives alone.
    hidden = (1 if size == 4 else 3) * net.mlp_hidden
    block = 12 * d + mixers[0].branch_activations() + 1.5 * kv + hidden
    outside = 6.5 * d + net.vocab_size
    # The saved tensors of a recomputed block are its inputs, d; its peak of resident memory grows by ten times that,
    # as measured between 4 and 16 layers.
    kept = layers * 10 * d + block if runtime.activation_checkpointing else layers * block
    # While the backward pass begins there are the logits' gradient and its making; later a block's own gradients.
    passing = max(2 * net.vocab_size, 1.4 * block)
    copies = layers * (matrices // layers) * size if size == 2 else 0
    return MemoryEstimate(4 * weights, int(tokens * ((kept + outside) * size + passing * 4)) + copies)


def free_memory() -> int | None:
    """Bytes of memory that the system and the process's control group still allow; None where neither is known."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            most, taken = (int((root / name).read_text(encoding="utf-8")) for name in (limit, used))
            # Cached files give way.
            lines = (root / stat).read_text(encoding="utf-8").splitlines()
            taken -= next((int(line.split()[1]) for line in lines if line.startswith(f"{cache} ")), 0)
        except (OSError, ValueError):
            continue  # no such group, or "max"
        limits.append(max(most - taken, 0))
    return min(limits, default=None)


def check_memory(estimate: MemoryEstimate, free: int | None, ranks: int = 1) -> None:
    """Warns where it will be tight.

    Args:
        estimate: What a rank needs.
        free: Bytes that there are for all ranks of this machine; None checks nothing.
        ranks: How many share them.

    Raises:
        UserError: the estimate is far beyond what is free.
    """
    needed = estimate.total * ranks
    if free is None or needed <= TIGHT * free:
        return
    text = (
        f"a training step needs about {needed / GIB:.1f} GiB of memory and {free / GIB:.1f} GiB are free: take a "
        "smaller network (--config configs/demo.yaml), fewer data.micro_batch_size, a shorter data.seq_len, or "
        "--model.runtime.activation_checkpointing true"
    )
    if needed > IMPOSSIBLE * free:
        raise UserError(text + "; --check_memory false tries it all the same")
    log.warning("%s", text)
