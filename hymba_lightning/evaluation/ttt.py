"""Score-first test-time training: a chunk's nats are final before the network trains on it.

The rules that make the score honest: a token's probability depends on the artifact and the tokens before it alone, and
no token is scored after an update that has seen it. One left-to-right pass; nothing is scored twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.data.token_stream import Chunk, TokenStream
from hymba_lightning.evaluation.adapt import Adapter
from hymba_lightning.evaluation.carried import CarriedScorer
from hymba_lightning.evaluation.clock import EvaluationClock
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.recorded import RecordedForward
from hymba_lightning.evaluation.score import Score, WindowScorer, world
from hymba_lightning.model import Hymba
from hymba_lightning.model.gradients import Gradients


@dataclass(frozen=True)
class ChunkScore:
    """A chunk's final score: nats (n,) float32 of every token, in order, from how many tokens each was predicted
    (context (n,) int64), and the sums."""

    nats: Tensor
    context: Tensor
    score: Score


def build_scorer(
    net: Hymba, seq_len: int, config: TTTConfig, forward: Callable[..., Any] | None = None
) -> WindowScorer | CarriedScorer:
    """What gives a part of the stream its nats under `config.mode`; `forward` is called in the network's place."""
    if config.mode == "carried":
        return CarriedScorer(net, seq_len, config.warm_tokens, config.state_after_update == "rewarm", forward)
    return WindowScorer(net, seq_len, config.stride or seq_len, config.score_batch_seqs, forward)


class ScoreFirstTTT:
    """Scores chunks in order and trains `net` in between. Every rank calls each method with the same chunks.

    Usage: for each chunk `score_chunk`, then `adapt_chunk`. Raises ValueError if a chunk comes out of turn, comes
    twice, or is adapted to before it was scored: by its number and by its tokens, which must follow those of the chunk
    before, be the `stream`'s where one is given, and be the same for adapting as for scoring.

    Args:
        net: The network, which is changed.
        seq_len: Tokens of one forward pass: of a sequence, a window or a piece, as the mode is.
        config: How to score and how to adapt.
        time_fn: A monotonic clock in seconds.
        started: Its reading when the evaluation began, which `config.limit_seconds` counts from; None for now.
        stream: All tokens that the chunks are cut from; stream[a:b] gives some. None: not known.
        cuda_graph: On a GPU replay passes that come again from CUDA graphs.
    """

    def __init__(
        self,
        net: Hymba,
        seq_len: int,
        config: TTTConfig,
        time_fn: Callable[[], float] = time.monotonic,
        started: float | None = None,
        stream: TokenStream | Tensor | None = None,
        cuda_graph: bool = True,
    ) -> None:
        self.net, self.seq_len, self.config = net, seq_len, config
        self._records = cuda_graph and self.device.type == "cuda"
        self._scoring = RecordedForward(net, record=self._records)
        self.scorer = build_scorer(net, seq_len, config, self._scoring)
        self.adapter = Adapter(net, config) if config.epochs else None
        self.clock = EvaluationClock(config.limit_seconds, net.tok_emb.weight.device, time_fn, started)
        self.n_scored = self.n_adapted = 0
        self.stream = stream
        self._position = 0  # in the stream, of the last token scored
        self._last: Chunk | None = None  # with tokens of our own, which nobody can change
        self._gradients: Gradients | None = None
        self.epochs_done: list[int] = []
        """Epochs trained on each chunk so far."""

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.net.tok_emb.weight.device

    def score_chunk(self, chunk: Chunk) -> ChunkScore:
        """Scores every target of the chunk with the weights as they are. The result is never revised."""
        if chunk.index != self.n_scored:
            raise ValueError(f"chunk {chunk.index} came where {self.n_scored} is due: one left-to-right pass only")
        if self.config.epochs and self.n_adapted != self.n_scored:
            raise ValueError(f"chunk {chunk.index - 1} was scored but not adapted to before chunk {chunk.index}")
        self._check_tokens(chunk)
        started = self.clock.elapsed()
        tokens, target_bytes = self._part_to_score(chunk)
        nats, context = self.scorer.score(tokens)
        score = Score(float(nats.double().sum()), nats.numel(), int(target_bytes.sum()))
        if not math.isfinite(score.nats):
            cause = "training on those before it made the weights useless: lower ttt.lr"
            cause = cause if any(self.epochs_done) else "the weights are no finite numbers, or far too large"
            raise ValueError(f"chunk {chunk.index} scores {score.nats} nats: {cause}")
        self.n_scored += 1
        self._position += chunk.tokens.numel() - 1
        self._last = chunk._replace(tokens=chunk.tokens.clone())
        self.clock.note_scoring(self.clock.elapsed() - started, nats.numel())
        return ChunkScore(nats, context, score)

    def adapt_chunk(self, chunk: Chunk) -> float | None:
        """Trains on a chunk that was scored. The last chunk is left out: nothing is scored after it.

        Returns the mean training loss in nats per token, or None where nothing was done.
        """
        if chunk.index != self.n_scored - 1 or chunk.index != self.n_adapted:
            raise ValueError(
                f"chunk {chunk.index} cannot be trained on now: {self.n_scored} chunks were scored and "
                f"{self.n_adapted} adapted to; score first, adapt once"
            )
        if (
            self._last is None
            or not torch.equal(chunk.tokens, self._last.tokens)
            or chunk.n_chunks != self._last.n_chunks
        ):
            raise ValueError(f"chunk {chunk.index} has other tokens now than when it was scored")
        self.n_adapted += 1
        self.epochs_done.append(0)
        if self.adapter is None or chunk.index == chunk.n_chunks - 1:
            return None
        tokens = self._start_of_document(chunk.tokens).to(self.device)
        sequences = cut_sequences(tokens, self.config.train_seq_len or self.seq_len, self.config.drop_partial)
        if not sequences:
            return None
        lr = self.config.lr_at(chunk.index, chunk.n_chunks)
        was_training = self.net.training
        self.net.train()
        required = [(p, p.requires_grad) for p in self.net.parameters()]
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for parameter in self.adapter.weights:
            parameter.requires_grad_(True)
        losses: list[Tensor] = []
        try:
            with torch.enable_grad():
                self._train(sequences, lr, chunk, losses)
        finally:
            # Also after an interrupt: a network that nobody can train any more would not tell.
            for parameter, before in required:
                parameter.requires_grad_(before)
            self.net.train(was_training)
        if not losses:
            return None
        self.scorer.weights_changed()
        return float(torch.stack(losses).mean())

    def _part_to_score(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The chunk's tokens (n+1,) on the network's device and its targets' bytes (n,): under drop_partial, of whole
        sequences."""
        tokens, target_bytes = chunk.tokens.to(self.device), chunk.target_bytes
        if not self.config.drop_partial:
            return tokens, target_bytes
        kept = (tokens.numel() - 1) // self.seq_len * self.seq_len
        if kept == 0 and self._last is None:
            raise ValueError(
                f"ttt.drop_partial leaves nothing of a chunk of {tokens.numel() - 1:,} tokens, which is shorter "
                f"than a sequence ({self.seq_len:,}): set it to false, or lengthen data.ttt_chunk_tokens"
            )
        return tokens[: kept + 1], target_bytes[:kept]

    def _check_tokens(self, chunk: Chunk) -> None:
        """Raises ValueError for tokens that are not the next ones, whatever the chunk's number."""
        where, n = self._position, chunk.tokens.numel() - 1
        if n < 1 or chunk.target_bytes.numel() != n:
            raise ValueError(f"chunk {chunk.index} has {n} targets and byte counts for {chunk.target_bytes.numel()}")
        if chunk.start is not None and chunk.start != where:
            raise ValueError(f"chunk {chunk.index} has the tokens from {chunk.start} on, where {where} is due")
        if self._last is not None and (
            chunk.tokens[0] != self._last.tokens[-1] or chunk.n_chunks != self._last.n_chunks
        ):
            raise ValueError(f"chunk {chunk.index} does not go on where the chunk before it ended")
        if not chunk.index < chunk.n_chunks:
            raise ValueError(f"chunk {chunk.index} is past the end: {chunk.n_chunks} chunks are the whole stream")
        if self.stream is None:
            return
        stop = where + n + 1
        if not torch.equal(chunk.tokens.cpu(), self.stream[where:stop].cpu()):
            raise ValueError(f"chunk {chunk.index} does not hold the stream's tokens {where} to {stop - 1}")
        if (chunk.index == chunk.n_chunks - 1) != (stop == len(self.stream)):
            raise ValueError(
                f"chunk {chunk.index} of {chunk.n_chunks} ends at token {stop - 1} of a stream of {len(self.stream)}"
            )

    def _start_of_document(self, tokens: Tensor) -> Tensor:
        """Under reset_at_bos: forgets what other documents taught and drops their tokens."""
        if not self.config.reset_at_bos:
            return tokens
        starts = (tokens == self.net.config.bos_id).nonzero()
        if not starts.numel():
            return tokens
        assert self.adapter is not None
        self.adapter.reset()
        self.scorer.weights_changed()
        return tokens[int(starts[-1]) :]

    def _train(self, sequences: list[Tensor], lr: float, chunk: Chunk, losses: list[Tensor]) -> None:
        """Up to config.epochs passes over the sequences, as many as the clock allows."""
        chunk_started = now = self.clock.elapsed()
        per_update = self.config.update_seqs or self.config.batch_seqs * world()[1]
        left = chunk.n_chunks - 1 - chunk.index
        for epoch in range(self.config.epochs):
            allows = partial(
                self.clock.allows_epoch,
                chunk_started=chunk_started,
                chunks_left=left,
                first=epoch == 0,
                forwards_per_score=self.scorer.forwards_per_score,
            )
            if not allows(now=now) and self.clock.needs_second_look(now=now, chunks_left=left):
                chunk_started = now = self._time_scoring_again(chunk, now)
            if not allows(now=now):
                self.clock.tell_fewer_epochs(now=now, chunks_left=left)
                return
            starts = range(0, len(sequences), per_update)
            for first in starts:
                losses.append(self._update(sequences[first : first + per_update], lr))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            before, now = now, self.clock.elapsed()
            self.clock.note_epoch(now - before, len(starts))
            self.epochs_done[-1] += 1

    def _time_scoring_again(self, chunk: Chunk, now: float) -> float:
        """Scores the first chunk once more for its time alone, now that nothing is compiled; returns the time after."""
        build_scorer(self.net, self.seq_len, self.config, self._scoring).score(self._part_to_score(chunk)[0])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        after = self.clock.elapsed()
        self.clock.note_second_look(after - now)
        return after

    def _update(self, sequences: list[Tensor], lr: float) -> Tensor:
        """One step on the mean loss over all tokens of `sequences`, shared out over the ranks.

        A rank without a sequence takes part with zero gradients, so any number of sequences works at any world size,
        and the step is the same for every world size. Returns the mean loss, on every rank.
        """
        rank, size = world()
        mine = sequences[len(sequences) * rank // size : len(sequences) * (rank + 1) // size]
        n_tokens = sum(s.numel() - 1 for s in sequences)
        assert self.adapter is not None
        self.adapter.clear_gradients()
        if self._gradients is None:
            self._gradients = Gradients(self._total_nats, self.adapter.weights, record=self._records)
        self._gradients.clear()
        total = torch.zeros((), device=self.device)
        for same_length in group_equal(mine):
            batch = torch.stack(same_length)
            total += self._gradients.add(batch[:, :-1], batch[:, 1:], weight=1 / n_tokens) / n_tokens
        return self.adapter.update(lr, total)

    def _total_nats(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.net(inputs, targets, reduction="sum")


def cut_sequences(tokens: Tensor, seq_len: int, drop_partial: bool) -> list[Tensor]:
    """tokens (n+1,) → pieces of seq_len+1 tokens that share their border token; the last one shorter unless dropped."""
    n = tokens.numel() - 1
    stop = n // seq_len * seq_len if drop_partial else n
    return [tokens[first : min(first + seq_len, stop) + 1] for first in range(0, stop, seq_len)]


def group_equal(sequences: list[Tensor]) -> list[list[Tensor]]:
    """Sequences grouped by length, the lengths in order of appearance."""
    groups: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.numel(), []).append(sequence)
    return list(groups.values())


def score_first_ttt(
    net: Hymba,
    chunks: Iterable[Chunk],
    seq_len: int,
    config: TTTConfig,
    time_fn: Callable[[], float] = time.monotonic,
    stream: TokenStream | Tensor | None = None,
) -> list[ChunkScore]:
    """Runs the whole stream: score each chunk, then adapt. `net` is changed. Returns the chunks' final scores.

    Raises ValueError for chunks that are not all of a stream's, once each and in order.
    """
    ttt = ScoreFirstTTT(net, seq_len, config, time_fn, stream=stream)
    scores, n_chunks = [], 0
    for chunk in chunks:
        n_chunks = chunk.n_chunks
        scores.append(ttt.score_chunk(chunk))
        ttt.adapt_chunk(chunk)
    if len(scores) != n_chunks:
        raise ValueError(f"{len(scores)} chunks were scored, and {n_chunks} are the whole stream")
    return scores
