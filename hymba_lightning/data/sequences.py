"""Who reads which tokens: training spans, validation sequences.

Shapes: B sequences, T = seq_len tokens. Everything here is a pure function of its arguments;
rank and world size are passed in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import TokenStream, target_bytes


class Batch(NamedTuple):
    """Sequences of one micro-batch."""

    inputs: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: the token after each input."""
    target_bytes: Tensor
    """(B, T) int16: UTF-8 bytes each target stands for, given its input. Training batches have an empty (0,) tensor."""


# Tensors of these hold no token ids.
NO_IDS = {torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64}
# What a loader may give: this package's batches, or pairs (inputs, targets) of (B, T) token ids.
AnyBatch = Batch | tuple[Tensor, ...] | list[Tensor]


def as_batch(batch: AnyBatch, vocab_size: int) -> Batch:
    """(inputs, targets) of any loader as a `Batch` of int64, whose bytes of text are unknown.

    Raises:
        TypeError: it is no pair of (B, T) integers.
        ValueError: it holds ids that no token of `vocab_size` has.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, list | tuple) and len(batch) in (2, 3) and all(isinstance(part, Tensor) for part in batch):
        inputs, targets, *more = batch
        if inputs.dim() == 2 and inputs.shape == targets.shape and not {inputs.dtype, targets.dtype} & NO_IDS:
            no_bytes = torch.empty(0, dtype=torch.int16)
            known = known_ids(inputs, vocab_size), known_ids(targets, vocab_size)
            return Batch(*known, more[0] if more else no_bytes)
    raise TypeError(f"a batch is a pair (inputs, targets) of (B, T) integer token ids, not {_description(batch)}")


def targets_of(batch: Any) -> Tensor | None:
    """The targets (B, T) of a batch that `as_batch` would take, as they are; None of any other."""
    pair = isinstance(batch, list | tuple) and len(batch) in (2, 3)
    return batch[1] if pair and isinstance(batch[1], Tensor) and batch[1].dim() == 2 else None


def known_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Any integers as int64 ids of tokens. A look at those of a GPU waits for it.

    Raises:
        TypeError: they are no integers.
        ValueError: naming an id that no token has.
    """
    if ids.dtype in NO_IDS:
        raise TypeError(f"a batch holds {_description(ids)}, and token ids are integers")
    lowest, highest = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"a batch holds token {lowest if lowest < 0 else highest}, but the network knows 0 … {vocab_size - 1} "
            "(model.net.vocab_size); targets cannot be left out by a number such as -100"
        )
    return ids.to(torch.int64)


def _description(batch: Any) -> str:
    """What a batch is, for whoever made its loader."""
    if isinstance(batch, Tensor):
        return f"a tensor of {str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, list | tuple):
        return f"{type(batch).__name__} of {', '.join(_description(part) for part in batch)}"
    return type(batch).__name__


class TrainSpans:
    """The training stream cut into spans of seq_len + 1 tokens, numbered from 0 without end.

    In order, span s begins at token s·(seq_len+1) of the endlessly repeated stream. With a shuffle seed, every pass
    over the data takes its spans in an order and from a first token of its own, drawn from (seed, pass).

    Args:
        stream: Training tokens, at least seq_len + 1.
        seq_len: T.
        shuffle_seed: None keeps the order of the shards.
    """

    def __init__(self, stream: TokenStream, seq_len: int, shuffle_seed: int | None = None) -> None:
        self.stream = stream
        self.span_tokens = seq_len + 1
        self.shuffle_seed = shuffle_seed
        self.n_tokens = stream.n_tokens
        self.spans_per_pass = stream.n_tokens // self.span_tokens
        """Whole spans of one pass over the data."""
        self._order: tuple[int, int, np.ndarray] | None = None

    def start(self, span: int) -> int:
        """Position in the endless stream of the span's first token."""
        if self.shuffle_seed is None:
            return span * self.span_tokens
        epoch, place = divmod(span, self.spans_per_pass)
        # One assignment of a whole tuple: the reading thread and the training loop may both be here.
        order = self._order
        if order is None or order[0] != epoch:
            # RandomState, because numpy keeps its stream the same in every version.
            random = np.random.RandomState([self.shuffle_seed, epoch])
            order = self._order = (
                epoch,
                int(random.randint(self.span_tokens)),
                random.permutation(self.spans_per_pass),
            )
        return order[1] + int(order[2][place]) * self.span_tokens

    def tokens(self, span: int) -> np.ndarray:
        """The span's seq_len + 1 tokens, int64."""
        return self.stream.read(self.start(span), self.span_tokens)

    def locate(self, span: int) -> tuple[Path, int]:
        """Shard file, and offset in it, of the span's first token."""
        return self.stream.locate(self.start(span))

    def batch(self, first_span: int, micro_batch_size: int) -> Batch:
        """Spans first_span … first_span + micro_batch_size - 1 as a training batch."""
        tokens = torch.from_numpy(np.stack([self.tokens(first_span + row) for row in range(micro_batch_size)]))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.empty(0, dtype=torch.int16))


def first_span(micro_step: int, micro_batch_size: int, rank: int, world_size: int) -> int:
    """First of the micro_batch_size spans that `rank` reads in the global micro-step, counted from span 0."""
    return (micro_step * world_size + rank) * micro_batch_size


class ValSequences:
    """The validation stream cut into sequences: every token after the first is a target exactly once, no padding.

    Sequence k has inputs kT … kT+T-1 and the tokens one later as targets; the last one ends with the stream. Batches
    hold consecutive full-length sequences; a shorter last sequence is a batch by itself. Rank r takes batches
    r, r+W, r+2W, …; where its share is one short it ends with a batch of no sequences (B = 0), so that all ranks make
    the same number of steps and none waits for another in a collective.

    Args:
        stream: Validation tokens, at least 2.
        token_bytes: Byte tables of the tokenizer.
        seq_len: T.
        batch_size: Sequences per batch.
    """

    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, seq_len: int, batch_size: int) -> None:
        self.stream = stream
        self.token_bytes = token_bytes
        self.seq_len = seq_len
        n_full, tail = divmod(stream.n_tokens - 1, seq_len)
        # (first sequence, sequences, tokens of each) per batch.
        self._batches = [
            (first, min(batch_size, n_full - first), seq_len) for first in range(0, n_full, batch_size)
        ] + ([(n_full, 1, tail)] if tail else [])

    @property
    def n_batches(self) -> int:
        """Batches of the whole stream, all ranks together."""
        return len(self._batches)

    def batches_per_rank(self, world_size: int) -> int:
        """Batches every rank is given, empty ones included."""
        return -(-self.n_batches // world_size)

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream; past the last one a batch with B = 0."""
        first, n_sequences, length = self._batches[index] if index < self.n_batches else (0, 0, self.seq_len)
        if n_sequences == 0:
            no_tokens = torch.empty((0, length), dtype=torch.int64)
            return Batch(no_tokens, no_tokens, torch.empty((0, length), dtype=torch.int16))
        start = first * self.seq_len
        tokens = self.stream[start : start + n_sequences * length + 1]
        inputs, targets = tokens[:-1].view(n_sequences, length), tokens[1:].view(n_sequences, length)
        return Batch(inputs, targets.clone(), target_bytes(self.token_bytes, inputs, targets))
