"""Score-first test-time training: a chunk's nats are final before the network trains on it.

The rules that make the score honest: a token's probability depends on the artifact and the tokens before it alone, and
no token is scored after an update that has seen it. One left-to-right pass; nothing is scored twice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba_lightning.data.sequences import Chunk
from hymba_lightning.evaluation.score import Score, score_tokens, sum_over_ranks, world
from hymba_lightning.model import Hymba


@dataclass(frozen=True)
class TTTConfig:
    """How the network adapts between the chunks of the validation stream."""

    epochs: int = 3
    """Passes of training over a chunk after it was scored; 0 only scores."""
    lr: float = 0.002
    """Learning rate of the first chunk; later ones follow half a cosine down to zero at the last."""
    momentum: float = 0.9
    """Momentum of SGD. One optimizer, with its momentum, goes through the whole stream."""
    batch_seqs: int = 4
    """Sequences per rank in one update."""
    grad_clip: float = 1.0
    """Largest norm of an update's gradient; 0 does not clip."""
    freeze_blocks: int = 2
    """The first blocks, left as they are."""
    score_batch_seqs: int = 4
    """Sequences per rank in one scoring pass."""
    stride: int = 0
    """Sliding-window scoring: tokens scored per window, each with at least seq_len - stride tokens of context; 0 scores
    cold sequences of seq_len."""
    drop_partial: bool = False
    """Leave out the tokens after a chunk's last full sequence: the reference's defect 5, for comparison only. The score
    then misses a part of the text."""

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "momentum", "grad_clip", "freeze_blocks", "stride"):
            if getattr(self, name) < 0:
                raise ValueError(f"ttt.{name} must not be negative, got {getattr(self, name)}")
        for name in ("batch_seqs", "score_batch_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"ttt.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ChunkScore:
    """A chunk's final score: nats (n,) float32 of every token, in order, and the sums."""

    nats: Tensor
    score: Score


@dataclass
class ScoreFirstTTT:
    """Scores chunks in order and trains `net` in between. Every rank calls each method with the same chunks.

    Usage: for each chunk `score_chunk`, then `adapt_chunk`. Raises ValueError if a chunk comes out of turn, comes
    twice, or is adapted to before it was scored.
    """

    net: Hymba
    seq_len: int
    config: TTTConfig
    n_scored: int = field(default=0, init=False)
    n_adapted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.config.stride > self.seq_len:
            raise ValueError(f"ttt.stride={self.config.stride} is over seq_len={self.seq_len}: tokens would be skipped")
        frozen = tuple(f"blocks.{i}." for i in range(self.config.freeze_blocks))
        named = list(self.net.named_parameters())
        self.params = [p for name, p in named if not name.startswith(frozen)]
        if self.config.epochs and not self.params:
            raise ValueError("no parameter is left to adapt: lower ttt.freeze_blocks or set ttt.epochs to 0")
        self._required_grad = [(p, p.requires_grad) for _, p in named]
        if self.config.epochs:
            self.optimizer = torch.optim.SGD(self.params, lr=self.config.lr, momentum=self.config.momentum)
        self._context: Tensor | None = None

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
        tokens = chunk.tokens.to(self.device)
        target_bytes = chunk.target_bytes
        if self.config.drop_partial:
            kept = (tokens.numel() - 1) // self.seq_len * self.seq_len
            tokens, target_bytes = tokens[:kept + 1], target_bytes[:kept]
        stride = self.config.stride or self.seq_len
        before = self._context if stride < self.seq_len else None
        stream = tokens if before is None else torch.cat([before, tokens])
        n_context = stream.numel() - tokens.numel() + 1
        nats = score_tokens(self.net, stream, n_context, seq_len=self.seq_len, stride=stride,
                            batch_size=self.config.score_batch_seqs)
        self.n_scored += 1
        # The last token is the next chunk's tokens[0]; what lies before it gives context to a sliding window.
        self._context = stream[max(stream.numel() - 1 - self.seq_len, 0):-1]
        return ChunkScore(nats, Score(float(nats.double().sum()), nats.numel(), int(target_bytes.long().sum())))

    def adapt_chunk(self, chunk: Chunk) -> float | None:
        """Trains on a chunk that was scored. The last chunk is left out: nothing is scored after it.

        Returns the mean training loss in nats per token, or None where nothing was done.
        """
        if chunk.index != self.n_scored - 1 or chunk.index != self.n_adapted:
            raise ValueError(f"chunk {chunk.index} cannot be trained on now: {self.n_scored} chunks were scored and "
                             f"{self.n_adapted} adapted to; score first, adapt once")
        self.n_adapted += 1
        if not self.config.epochs or chunk.index == chunk.n_chunks - 1:
            return None
        lr = self.config.lr * 0.5 * (1 + math.cos(math.pi * chunk.index / max(chunk.n_chunks - 1, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens = chunk.tokens.to(self.device)
        sequences = cut_sequences(tokens, self.seq_len, self.config.drop_partial)
        was_training = self.net.training
        self.net.train()
        self._require_grad_of_adapted_only()
        losses = []
        with torch.enable_grad():
            for _ in range(self.config.epochs):
                per_update = self.config.batch_seqs * world()[1]
                for first in range(0, len(sequences), per_update):
                    losses.append(self._update(sequences[first:first + per_update]))
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        self.net.train(was_training)
        return float(torch.stack(losses).mean()) if losses else None

    def _require_grad_of_adapted_only(self) -> None:
        for parameter, _ in self._required_grad:
            parameter.requires_grad_(False)
        for parameter in self.params:
            parameter.requires_grad_(True)

    def _update(self, sequences: list[Tensor]) -> Tensor:
        """One SGD step on the mean loss over all tokens of `sequences`, shared out over the ranks.

        A rank without a sequence takes part with zero gradients, so any number of sequences works at any world size,
        and the step is the same for every world size. Returns the mean loss, on every rank.
        """
        rank, size = world()
        mine = sequences[len(sequences) * rank // size: len(sequences) * (rank + 1) // size]
        n_tokens = sum(s.numel() - 1 for s in sequences)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for same_length in group_equal(mine):
            batch = torch.stack(same_length)
            loss = self.net(batch[:, :-1], batch[:, 1:], reduction="sum") / n_tokens
            loss.backward()
            total += loss.detach()
        if size > 1:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
            flat = sum_over_ranks(torch.cat([g.float().flatten() for g in grads] + [total[None]]))
            total = flat[-1]
            for p, piece in zip(self.params, flat[:-1].split([p.numel() for p in self.params]), strict=True):
                p.grad = piece.view_as(p).to(p.dtype)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def cut_sequences(tokens: Tensor, seq_len: int, drop_partial: bool) -> list[Tensor]:
    """tokens (n+1,) → pieces of seq_len+1 tokens that share their border token; the last one shorter unless dropped."""
    n = tokens.numel() - 1
    stop = n // seq_len * seq_len if drop_partial else n
    return [tokens[first:min(first + seq_len, stop) + 1] for first in range(0, stop, seq_len)]


def group_equal(sequences: list[Tensor]) -> list[list[Tensor]]:
    """Sequences grouped by length, the lengths in order of appearance."""
    groups: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.numel(), []).append(sequence)
    return list(groups.values())


def score_first_ttt(net: Hymba, chunks: Iterable[Chunk], seq_len: int, config: TTTConfig) -> list[ChunkScore]:
    """Runs the whole stream: score each chunk, then adapt. `net` is changed. Returns the chunks' final scores."""
    ttt = ScoreFirstTTT(net, seq_len, config)
    scores = []
    for chunk in chunks:
        scores.append(ttt.score_chunk(chunk))
        ttt.adapt_chunk(chunk)
    return scores
