"""Whether an evaluation obeys the rules of the score, found out from the outside, by calling it.

The rules, of any evaluator that gives every token of a stream its nats:
    every token once      n tokens have n - 1 finite scores that are not negative, whatever n
    the same again        the same stream has the same scores
    the past is fixed     a score depends on the tokens before its token alone: whatever comes later may change, scores
                          before it may not. So a token is scored before any training that saw it, and is not rescored
    a full distribution   the probabilities of all that could stand at a position sum to one

An evaluator cannot tell that it is audited from what comes before a changed position, which is the true text; what
comes after it may be noise, since an evaluator that goes by that breaks the rule. The true stream comes first, as
where a score is taken, and several times among the others; nearly all have its length, and their order is drawn at
random. Futures of noise, and of one id repeated, also catch an evaluator that makes several passes and keeps the one
with the best total: with more text of the same kind for a future it would keep the same one. Positions are drawn from
the whole stream, one from each of as many equal stretches as are asked for. What is rare is found by chance: a cheat
on a share s of the tokens passes n positions with probability (1 - s)^n, so that what it gains is small.

Sums over all ids are most of the work. An evaluator that can be trusted to leave off may come with a probe, which gives
one token's nats and does no more than they need. Nothing is taken for granted from it but what some ids, drawn at every
position, show: for them the whole evaluation must give the same.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Evaluator = Callable[[Tensor], Tensor]
Probe = Callable[[Tensor, int], float]

EVERY_TOKEN, SAME_AGAIN = "every token once", "the same again"
PAST_FIXED, DISTRIBUTION = "the past is fixed", "a full distribution"
RULES = (EVERY_TOKEN, SAME_AGAIN, PAST_FIXED, DISTRIBUTION)
SUM_TOLERANCE = 1e-3
# Ids at each position where probabilities are summed that a whole evaluation must score as the probe does.
PROBES_CHECKED = 8
# What stands from a changed position on.
FUTURES = ("one token", "text from elsewhere", "its ids in disorder", "noise", "one id")


class RuleBrokenError(Exception):
    """An evaluator breaks a rule of the score."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"rule broken: {rule}: {what}")
        self.rule = rule


@dataclass(frozen=True)
class AuditReport:
    """An audit that found nothing."""

    tokens: int
    """Tokens of the stream."""
    evaluations: int
    """How often the evaluator was called."""
    probes: int
    """How often a token's nats were asked for alone."""
    past_positions: list[int]
    """From where on the stream was changed."""
    distribution_positions: list[int]
    """Where the probabilities were summed."""
    seed: int
    """Draws the same streams again."""
    seconds: float
    also: tuple[str, ...] = ()
    """Rules besides these that whoever called it has tried."""

    def __str__(self) -> str:
        rules = "\n".join(
            f"  kept: {rule}" if rule != DISTRIBUTION or self.distribution_positions else f"  not tried: {rule}"
            for rule in (*RULES, *self.also)
        )
        streams = f"streams of {self.tokens} tokens" + (f" and {self.probes} of one token" if self.probes else "")
        return (
            f"{rules}\n{self.evaluations} evaluations of {streams} in {self.seconds:.1f} s; "
            f"changed from {len(self.past_positions)} positions on, probabilities summed at "
            f"{len(self.distribution_positions)}; seed {self.seed}"
        )


class _Trial(NamedTuple):
    stream: Tensor
    rule: str
    position: int  # of the first token that differs from the true stream; its length where none does
    alone: bool = False  # the probe is asked, for the token at that position


def audit(
    evaluate: Evaluator,
    tokens: Tensor,
    vocab_size: int,
    *,
    past_positions: int = 24,
    distribution_positions: int = 3,
    tolerance: float = 0.0,
    seed: int | None = None,
    jobs: int = 1,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Calls `evaluate` about past_positions + (distribution_positions + 1) * vocab_size times, or with a probe
    past_positions + (distribution_positions + 1) * PROBES_CHECKED times.

    Args:
        evaluate: tokens (n,) int64 → nats (n-1,): -ln of the probability of each token after the first. Must start
            afresh in every call. Under several ranks all call this function with the same seed.
        tokens: The stream (n,) to audit with, n >= 16.
        vocab_size: Ids that could stand at a position.
        past_positions: Streams that differ from the true one from some position on.
        distribution_positions: Positions drawn where the probabilities of all ids are summed, as they are at the last
            token besides; 0 leaves that rule out.
        tolerance: Nats by which equal scores may differ; 0 on a CPU, where kernels add in one order.
        seed: Of all that is drawn; None draws a new one, so that nobody can know the positions.
        jobs: Calls of `evaluate` and `probe` at a time, from as many threads.
        probe: tokens (n,) int64, position → the nats that `evaluate` gives the token there, by less work.
        progress: Called with calls done and in all.

    Raises:
        RuleBrokenError: naming the rule and where it is broken.
        ValueError: an argument is out of range.
    """
    n = tokens.numel()
    if n < 16 or tokens.ndim != 1 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"an audit needs a stream of 16 tokens or more, each an id below {vocab_size}")
    if past_positions < 1 or distribution_positions < 0:
        raise ValueError("an audit needs a position to change the stream at")
    seed = secrets.randbits(32) if seed is None else seed
    rng, started = random.Random(seed), time.monotonic()
    tokens = tokens.clone()
    past = _spread(rng, n, past_positions)
    # The last token, which nothing follows, is a place of its own.
    summed = [*_spread(rng, n - 1, distribution_positions), n - 1] if distribution_positions else []
    trials = [_Trial(tokens, SAME_AGAIN, n) for _ in range(3)]
    kinds = [kind for _ in past for kind in rng.sample(FUTURES, len(FUTURES))]
    trials += [
        _Trial(_another_future(rng, kind, tokens, k, vocab_size), PAST_FIXED, k)
        for k, kind in zip(past, kinds, strict=False)
    ]
    trials += [
        _Trial(_with(tokens, k, token), DISTRIBUTION, k, alone=probe is not None)
        for k in summed
        for token in range(vocab_size)
    ]
    trials += [_Trial(tokens[:k].clone(), EVERY_TOKEN, k) for k in (2, *(max(k, 2) for k in _spread(rng, n, 3)))]
    if probe is not None:
        checked = [
            (k, token) for k in summed for token in rng.sample(range(vocab_size), min(PROBES_CHECKED, vocab_size))
        ]
        trials += [_Trial(_with(tokens, k, token), DISTRIBUTION, k) for k, token in checked]
    # The first call is the one that a score comes from: an evaluator that is another in it differs from the next.
    order = [0, *rng.sample(range(1, len(trials)), len(trials) - 1)]
    true: Tensor | None = None
    # Compared as they come: with every result kept, a large vocabulary would need much memory.
    waiting: list[tuple[_Trial, Tensor]] = []
    sums = dict.fromkeys(summed, 0.0)
    # Of each id at each position, by the probe where there is one, and by whole evaluations.
    alone: dict[tuple[int, int], float] = {}
    whole: dict[tuple[int, int], float] = {}
    with contextlib.closing(_called(evaluate, probe, [trials[index] for index in order], jobs)) as results:
        for done, (index, given) in enumerate(zip(order, results, strict=True)):
            trial, k = trials[index], trials[index].position
            nats = _scores([given], 2, k) if trial.alone else _scores(given, trial.stream.numel())
            if trial.rule == DISTRIBUTION:
                asked = float(nats[0] if trial.alone else nats[k - 1])
                (alone if trial.alone else whole)[k, int(trial.stream[k])] = asked
                if trial.alone or probe is None:
                    sums[k] += math.exp(-asked)
            if true is None and trial.rule == SAME_AGAIN:
                true = nats
            if trial.rule != EVERY_TOKEN and not trial.alone:
                waiting.append((trial, nats[: max(k - 1, 0)].float()))
            if true is not None:
                for earlier, scores in waiting:
                    _compare(earlier, true, scores, tolerance)
                waiting.clear()
            if progress is not None:
                progress(done + 1, len(order))
    for (k, token), nats_alone in alone.items():
        by = nats_alone - whole.get((k, token), nats_alone)
        if not abs(by) <= tolerance:
            raise RuleBrokenError(
                SAME_AGAIN, f"id {token} as token {k} has {by:+.6f} nats where nothing is scored after its chunk"
            )
    for k, total in sums.items():
        if not abs(total - 1) <= SUM_TOLERANCE:
            raise RuleBrokenError(
                DISTRIBUTION, f"the probabilities of all {vocab_size} ids as token {k} sum to {total:.6f}"
            )
    return AuditReport(n, len(trials) - len(alone), len(alone), past, summed, seed, time.monotonic() - started)


def _spread(rng: random.Random, n: int, count: int) -> list[int]:
    """A position from each of `count` equal stretches of 1 … n-1."""
    edges = [1 + (n - 1) * i // max(count, 1) for i in range(count + 1)]
    return [rng.randrange(low, high) for low, high in itertools.pairwise(edges) if low < high]


def _with(tokens: Tensor, position: int, token: int) -> Tensor:
    changed = tokens.clone()
    changed[position] = token
    return changed


def _another_future(rng: random.Random, kind: str, tokens: Tensor, k: int, vocab_size: int) -> Tensor:
    """The stream with another token at k and, for most kinds, another text after it."""
    n = tokens.numel()
    changed = tokens.clone()
    if kind == "text from elsewhere":
        changed[k:] = tokens.roll(-rng.randrange(1, n))[k:]
    elif kind == "its ids in disorder":
        changed[k:] = tokens[torch.tensor([rng.randrange(n) for _ in range(k, n)])]
    elif kind == "noise":
        changed[k:] = torch.tensor([rng.randrange(vocab_size) for _ in range(k, n)])
    elif kind == "one id":
        changed[k:] = tokens[rng.randrange(n)]
    if changed[k] == tokens[k]:
        others = tokens[tokens != tokens[k]]
        changed[k] = others[rng.randrange(others.numel())] if others.numel() else (int(tokens[k]) + 1) % vocab_size
    return changed


def _called(evaluate: Evaluator, probe: Probe | None, trials: list[_Trial], jobs: int) -> Generator[Any]:
    """What `evaluate` or `probe` gives for each trial, in order; a few calls ahead of what was asked for, no more."""

    def call(trial: _Trial) -> Any:
        stream = trial.stream.clone()
        return probe(stream, trial.position) if trial.alone and probe is not None else evaluate(stream)

    if jobs == 1:
        yield from map(call, trials)
        return
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for trial in trials:
                ahead.append(pool.submit(call, trial))
                if len(ahead) > 2 * jobs:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for begun in ahead:
                begun.cancel()


def _scores(given: Any, n: int, first: int = 1) -> Tensor:
    """What an evaluator gave for a stream of n tokens, checked; `first` is the place of the first token scored."""
    try:
        nats = torch.as_tensor(given).detach().cpu().double().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RuleBrokenError(EVERY_TOKEN, f"the scores are no numbers, but {type(given).__name__}") from error
    if nats.shape != (n - 1,):
        raise RuleBrokenError(
            EVERY_TOKEN, f"a stream of {n} tokens has scores of shape {list(nats.shape)}, not [{n - 1}]"
        )
    wrong = ~(torch.isfinite(nats) & (nats >= 0))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise RuleBrokenError(EVERY_TOKEN, f"token {first + place} of {n + first - 1} has {float(nats[place])} nats")
    return nats


def _compare(trial: _Trial, true: Tensor, scores: Tensor, tolerance: float) -> None:
    expected = true[: scores.numel()].float()
    differs = ((expected - scores).abs() > tolerance).nonzero()
    if not differs.numel():
        return
    where = int(differs[-1])
    by = float((scores - expected)[where])
    if trial.position == trial.stream.numel():
        raise RuleBrokenError(SAME_AGAIN, f"token {where + 1} has {by:+.6f} nats at another time")
    raise RuleBrokenError(
        PAST_FIXED,
        f"another text from token {trial.position} on changes the score of token "
        f"{where + 1}, before it, by {by:+.6f} nats",
    )
