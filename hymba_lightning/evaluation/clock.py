"""The evaluation's clock: one time for all ranks, and how many epochs still fit under a limit."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hymba_lightning.evaluation.score import world

log = logging.getLogger("hymba_lightning")

# An epoch that was not measured yet is taken for this many forward passes (a backward pass is about two).
EPOCH_IN_FORWARDS = 3.0
# What was measured may be exceeded by this factor the next time.
MARGIN = 1.1
# With so many chunks to come, what the first one took is looked at twice before training is left out for it.
MANY_CHUNKS = 8


class EvaluationClock:
    """Seconds since the evaluation began, rank 0's on every rank, and what they allow.

    What comes is taken to last as long as it last did, and a tenth more. The first chunk's times are of a start that
    compiles kernels, and must not cost it its training: where they forbid it, its scoring is to be timed again, and its
    first epoch says nothing of the next. Every rank must make the same calls.

    Args:
        limit_seconds: Seconds for everything; None for no limit.
        device: Where the tensor lives that carries rank 0's time to the others.
        time_fn: A monotonic clock in seconds.
        started: Its reading when the evaluation began; None for now.
    """

    def __init__(
        self,
        limit_seconds: float | None,
        device: torch.device,
        time_fn: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self.limit_seconds = limit_seconds
        self._device = device
        self._time = time_fn
        self._start = time_fn() if started is None else started
        self._score_seconds = 0.0
        self._epoch_seconds: float | None = None
        self.scorings: list[tuple[float, int]] = []
        """Seconds and tokens of every chunk's scoring."""
        self.epochs: list[tuple[float, int]] = []
        """Seconds and updates of every epoch over a chunk."""
        self._looked_twice = False
        self._compiling_seconds = 0.0
        self._steady_since = 0.0  # when the first epoch, which compiles, had ended
        self._warned = False

    def elapsed(self) -> float:
        """Seconds since the start by rank 0's clock."""
        seconds = self._time() - self._start
        if world()[1] == 1:
            return seconds
        shared = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def note_scoring(self, seconds: float, n_tokens: int) -> None:
        """Remembers how long a chunk's scoring took."""
        self._score_seconds = seconds
        self.scorings.append((seconds, n_tokens))

    def needs_second_look(self, *, now: float, chunks_left: int) -> bool:
        """Whether scoring is to be timed again before its time forbids an epoch: it was timed once, and one more pass
        cannot be what exceeds the limit, because there is room for it, or none for the scoring alone, be that a tenth
        faster than the first."""
        if self.limit_seconds is None or self._looked_twice or len(self.scorings) > 1 or chunks_left < MANY_CHUNKS:
            return False
        least = now + self._score_seconds * chunks_left / MARGIN
        most = now + MARGIN * self._score_seconds * (chunks_left + 1)
        return least > self.limit_seconds or most <= self.limit_seconds

    def note_second_look(self, seconds: float) -> None:
        """Remembers how long the first chunk's scoring takes when nothing is compiled."""
        self._compiling_seconds = max(self._score_seconds - seconds, 0.0)
        self._score_seconds = min(seconds, self._score_seconds)
        self._looked_twice = True

    def note_epoch(self, seconds: float, n_updates: int) -> None:
        """Remembers how long an epoch over a chunk took."""
        self._epoch_seconds = seconds
        self.epochs.append((seconds, n_updates))

    def summary(self) -> dict[str, float | None]:
        """Where the time went: seconds of all scoring and of all training, and, as medians over the chunks so that a
        start which compiles does not count, tokens scored a second and milliseconds of an update; None for what was
        not done."""
        rates = [n / max(seconds, 1e-9) for seconds, n in self.scorings]
        updates = [1000 * seconds / n for seconds, n in self.epochs]
        return {
            "scoring_seconds": sum(seconds for seconds, _ in self.scorings),
            "training_seconds": sum(seconds for seconds, _ in self.epochs),
            "scored_tokens_per_s": statistics.median(rates) if rates else None,
            "update_ms": statistics.median(updates) if updates else None,
        }

    def allows_epoch(
        self, *, now: float, chunk_started: float, chunks_left: int, first: bool, forwards_per_score: float
    ) -> bool:
        """Whether another epoch over this chunk still leaves time to score the `chunks_left` chunks after it.

        The first epoch may take all the time there is to spare; a further one only this chunk's equal share of it,
        counted from `chunk_started`. `forwards_per_score` is how often scoring passes over each token.
        """
        if self.limit_seconds is None:
            return True
        guess = EPOCH_IN_FORWARDS * self._score_seconds / forwards_per_score
        # The first epoch compiles too: for as long as the first scoring, as far as is known.
        epoch = guess + self._compiling_seconds if self._epoch_seconds is None else self._epoch_seconds
        end = self.limit_seconds - MARGIN * self._score_seconds * chunks_left
        if first:
            return now + MARGIN * epoch <= end
        if len(self.epochs) == 1 and chunks_left >= MANY_CHUNKS:
            if now + MARGIN * epoch > end:
                return False
            self._steady_since, epoch = now, min(guess, epoch)
        since = max(chunk_started, self._steady_since)
        return now + MARGIN * epoch <= since + (end - since) / max(chunks_left, 1)

    def tell_fewer_epochs(self, *, now: float, chunks_left: int) -> None:
        """Says, once, that an epoch is left out."""
        if not self._warned:
            self._warned = True
            log.info(
                "evaluation: %.1f of %.1f s are used with %d chunks to come: fewer epochs than asked for",
                now,
                self.limit_seconds,
                chunks_left,
            )
