"""Evaluators that break a rule, each kind in several disguises. All are built on honest ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from legality import ADAPT, CHUNK, SEQ_LEN, VOCAB, chunks, evaluation, lively_net, stream
from torch import Tensor

from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig
from hymba_lightning.evaluation.auditor import DISTRIBUTION, EVERY_TOKEN, PAST_FIXED, SAME_AGAIN, Evaluator

# An audit has some hundred streams scored, and trained on, by these.
FEW_UPDATES = ADAPT | {"batch_seqs": 4, "lr": 0.1}


def counts(tokens: Tensor) -> Tensor:
    """Honest and quick: how often each id came so far, of all that came."""
    before = F.one_hot(tokens[:-1], VOCAB).cumsum(0)
    return -torch.log((before.gather(1, tokens[1:, None])[:, 0] + 1) / (before.sum(1) + VOCAB))


def trained_first(tokens: Tensor, from_chunk: int = 0) -> Tensor:
    """From a chunk on: trains on a chunk, then scores it."""
    net, nats = lively_net(), []
    for chunk in chunks(tokens):
        alone = chunk._replace(index=0, n_chunks=2, start=0)
        if chunk.index >= from_chunk:
            cheat = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**FEW_UPDATES))
            cheat.score_chunk(alone)
            cheat.adapt_chunk(alone)
        nats.append(ScoreFirstTTT(net, SEQ_LEN, TTTConfig(epochs=0)).score_chunk(alone).nats)
    return torch.cat(nats)


def trained_on_second_halves(tokens: Tensor) -> Tensor:
    """Trains on the half of each chunk that lies ahead before it scores the half at hand."""
    net, nats = lively_net(), []
    for chunk in chunks(tokens):
        half = (chunk.tokens.numel() - 1) // 2
        for tokens_now, ahead in ((chunk.tokens[: half + 1], chunk.tokens[half:]), (chunk.tokens[half:], None)):
            if ahead is not None and ahead.numel() > 1:
                loss = net(ahead[None, :-1], ahead[None, 1:])
                net.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter -= 0.05 * parameter.grad
            if tokens_now.numel() > 1:
                with torch.no_grad():
                    nats.append(net(tokens_now[None, :-1], tokens_now[None, 1:], reduction="none")[0])
    return torch.cat(nats)


def two_passes(tokens: Tensor) -> Tensor:
    net = lively_net()
    for _ in range(2):
        ttt, nats = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**FEW_UPDATES)), []
        for chunk in chunks(tokens):
            nats.append(ttt.score_chunk(chunk).nats)
            ttt.adapt_chunk(chunk)
    return torch.cat(nats)


def better_of_two_passes(tokens: Tensor) -> Tensor:
    return torch.minimum(evaluation(epochs=0)(tokens), two_passes(tokens))


def best_in_all(tokens: Tensor) -> Tensor:
    """Of three whole passes, by how much they trust what came before, the one whose total is least."""
    before = F.one_hot(tokens[:-1], VOCAB).cumsum(0)
    passes = [
        -torch.log((before.gather(1, tokens[1:, None])[:, 0] + more) / (before.sum(1) + more * VOCAB))
        for more in (0.1, 1.0, 10.0)
    ]
    return min(passes, key=lambda nats: float(nats.sum()))


def better_for_each_chunk(tokens: Tensor) -> Tensor:
    """Of two models the one that was better on a chunk scores it."""
    before = F.one_hot(tokens[:-1], VOCAB).cumsum(0)
    found = []
    for more in (0.1, 10.0):
        likely = (before.gather(1, tokens[1:, None])[:, 0] + more) / (before.sum(1) + more * VOCAB)
        found.append((-torch.log(likely)).split(CHUNK))
    return torch.cat([min(pair, key=lambda nats: float(nats.sum())) for pair in zip(*found, strict=True)])


def rescored_at_the_end(tokens: Tensor) -> Tensor:
    """Scores the third chunk on anew once all have been read."""
    nats = evaluation(epochs=0)(tokens).clone()
    nats[2 * CHUNK :] = two_passes(tokens)[2 * CHUNK :]
    return nats


def peeking(tokens: Tensor, first: int, every: int, ahead: int) -> Tensor:
    """Knows, at some tokens, whether one that comes later is even, and is the surer for it."""
    nats = counts(tokens).clone()
    for i in range(first, nats.numel() - ahead, every):
        nats[i] *= 0.5 if tokens[i + 1 + ahead] % 2 else 0.9
    return nats


def peek_where_text_follows(tokens: Tensor) -> Tensor:
    """Peeks only in streams long enough to be the real one, away from their ends."""
    return peeking(tokens, 40, 3, 5) if tokens.numel() > 150 else counts(tokens)


def peek_through_another_thread(tokens: Tensor) -> Tensor:
    """Asks a thread that has read on for every seventh token."""
    nats = counts(tokens).clone()
    answers: dict[int, bool] = {}
    ahead = range(5, nats.numel() - 1, 7)
    reader = threading.Thread(target=lambda: answers.update((i, bool(tokens[i + 2] % 3)) for i in ahead))
    reader.start()
    reader.join()
    for i, wanted in answers.items():
        nats[i] *= 0.5 if wanted else 0.95
    return nats


def lowered(tokens: Tensor, first: int = 0, factor: float = 0.9) -> Tensor:
    nats = counts(tokens).clone()
    nats[first:] *= factor
    return nats


def evened_out(tokens: Tensor) -> Tensor:
    """Moves each chunk's scores so that they have a smaller mean."""
    return torch.cat([(nats - 0.05 * nats.mean()).clamp_min(0.0) for nats in counts(tokens).split(CHUNK)])


def capped(tokens: Tensor) -> Tensor:
    """No token costs more than 2.5 nats."""
    return counts(tokens).clamp_max(2.5)


def sharper_than_it_says(tokens: Tensor) -> Tensor:
    """Divides by the sum over half of the vocabulary."""
    nats = counts(tokens).clone()
    nats[CHUNK:] = (nats[CHUNK:] - 0.3).clamp_min(0.0)
    return nats


def without_tail(tokens: Tensor) -> Tensor:
    # Of a stream shorter than a sequence nothing would be left, which is refused.
    return evaluation(drop_partial=tokens.numel() > SEQ_LEN, **ADAPT)(tokens)


def a_chunk_twice(tokens: Tensor) -> Tensor:
    """Gives the first chunk's scores for the second, too."""
    nats = counts(tokens).clone()
    n = nats[CHUNK : 2 * CHUNK].numel()
    nats[CHUNK : 2 * CHUNK] = nats[:n]
    return nats


def free_of_charge(tokens: Tensor) -> Tensor:
    """Leaves dear tokens out: their scores are not numbers."""
    nats = counts(tokens).clone()
    nats[nats > 3] = torch.nan
    return nats


def best_in_front(tokens: Tensor) -> Tensor:
    return counts(tokens).sort().values


def stateful(cheat_when: Callable[[int], bool]) -> Callable[[], Evaluator]:
    """A cheat that goes by how often it was called."""

    def make() -> Evaluator:
        calls = [0]

        def score(tokens: Tensor) -> Tensor:
            calls[0] += 1
            return (lowered if cheat_when(calls[0]) else counts)(tokens)

        return score

    return make


def remembers() -> Evaluator:
    """Keeps what it read for the next time that it is called."""
    read = torch.zeros(VOCAB)

    def score(tokens: Tensor) -> Tensor:
        before = F.one_hot(tokens[:-1], VOCAB).cumsum(0) + read
        nats = -torch.log((before.gather(1, tokens[1:, None])[:, 0] + 1) / (before.sum(1) + VOCAB))
        read.add_(F.one_hot(tokens, VOCAB).sum(0))
        return nats

    return score


def knows_the_stream() -> Evaluator:
    """Cheats on the stream that counts, recognised by what it ends with, and on nothing else."""
    known: list[str] = []

    def score(tokens: Tensor) -> Tensor:
        if not known:
            known.append(hashlib.sha256(stream()[-60:].numpy().tobytes()).hexdigest())
        true = hashlib.sha256(tokens[-60:].numpy().tobytes()).hexdigest() == known[0]
        return lowered(tokens) if true else counts(tokens)

    return score


def always(evaluator: Evaluator) -> Callable[[], Evaluator]:
    return lambda: evaluator


ANY = {EVERY_TOKEN, SAME_AGAIN, PAST_FIXED, DISTRIBUTION}
# kind → disguise → (what makes the evaluator, rules that may catch it)
CHEATS: dict[str, dict[str, tuple[Callable[[], Evaluator], set[str]]]] = {
    "trains on what it scores": {
        "from the start": (always(trained_first), {PAST_FIXED, DISTRIBUTION}),
        "from the second chunk": (always(lambda t: trained_first(t, 1)), {PAST_FIXED, DISTRIBUTION}),
        "on the half ahead": (always(trained_on_second_halves), {PAST_FIXED}),
    },
    "scores again": {
        "second pass": (always(two_passes), {PAST_FIXED, DISTRIBUTION}),
        "the better of two": (always(better_of_two_passes), {PAST_FIXED, DISTRIBUTION}),
        "the best of three in all": (always(best_in_all), {PAST_FIXED, DISTRIBUTION}),
        "the better for each chunk": (always(better_for_each_chunk), {PAST_FIXED, DISTRIBUTION}),
        "from the third chunk": (always(rescored_at_the_end), {PAST_FIXED, DISTRIBUTION}),
    },
    "peeks": {
        "after token 130": (always(lambda t: peeking(t, 130, 1, 1)), {PAST_FIXED}),
        "every fifth token": (always(lambda t: peeking(t, 3, 5, 2)), {PAST_FIXED}),
        "through another thread": (always(peek_through_another_thread), {PAST_FIXED}),
        "in long streams": (always(peek_where_text_follows), {PAST_FIXED}),
    },
    "no distribution": {
        "lower": (always(lowered), {DISTRIBUTION}),
        "lower in later chunks": (always(lambda t: lowered(t, CHUNK)), {DISTRIBUTION}),
        "capped": (always(capped), {DISTRIBUTION}),
        "the last token": (always(lambda t: lowered(t, t.numel() - 2)), {DISTRIBUTION}),
        "over a chunk": (always(evened_out), {PAST_FIXED, DISTRIBUTION}),
        "half a vocabulary": (always(sharper_than_it_says), {DISTRIBUTION}),
    },
    "leaves tokens out": {
        "the tail": (always(without_tail), {EVERY_TOKEN}),
        "a chunk for another": (always(a_chunk_twice), {DISTRIBUTION}),
        "dear ones": (always(free_of_charge), {EVERY_TOKEN}),
        "sorted": (always(best_in_front), {PAST_FIXED, DISTRIBUTION}),
    },
    "knows when it is watched": {
        "first call": (stateful(lambda call: call == 1), ANY),
        "every other call": (stateful(lambda call: call % 2 == 0), ANY),
        "after twenty calls": (stateful(lambda call: call > 20), ANY),
        "the true stream": (knows_the_stream, ANY),
        "the text from before": (remembers, ANY),
    },
}
