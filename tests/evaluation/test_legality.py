"""The rules of the score, held on the public evaluation function in every mode and with every way to adapt."""

import pytest
import torch
from legality import (
    ADAPT,
    CHUNK,
    MODES,
    SEQ_LEN,
    VARIANTS,
    check_distribution,
    check_each_token_once,
    check_past_is_fixed,
    chunks,
    evaluation,
    lively_net,
    stream,
)
from tiny_lightning import run_ranks

from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig, score_first_ttt
from hymba_lightning.evaluation.adapt import Adapter

ALL = {**{name: ADAPT | mode for name, mode in MODES.items()},
       **{f"{name}, carried": ADAPT | MODES["carried"] | variant for name, variant in VARIANTS.items()}}


@pytest.mark.parametrize("name", ALL)
def test_the_past_is_fixed_bit_for_bit(name):
    check_past_is_fixed(evaluation(**ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_each_token_is_scored_once(name):
    check_each_token_once(evaluation(**ALL[name]))


@pytest.mark.parametrize("name", MODES)
def test_probabilities_sum_to_one(name):
    check_distribution(evaluation(**ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_nats_are_final_before_the_first_gradient(name, monkeypatch):
    """From a chunk's scoring to its training no weight moves, no gradient exists; training revises no nat."""
    net = lively_net()
    ttt = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**ALL[name]))
    kept = []
    weights = [p.detach().clone() for p in net.parameters()]

    def unmoved() -> bool:
        return all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))

    updates = []
    original = Adapter.update

    def update(self, lr, loss):
        if len(kept) == 1 and not updates:
            assert unmoved()
        updates.append(lr)
        return original(self, lr, loss)

    monkeypatch.setattr(Adapter, "update", update)
    for chunk in chunks(stream()):
        scored = ttt.score_chunk(chunk)
        kept.append((scored.nats, scored.nats.clone()))
        if chunk.index == 0:
            assert unmoved()
            assert all(p.grad is None for p in net.parameters())
            assert not updates
        ttt.adapt_chunk(chunk)
        assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(now, then) for now, then in kept)
    assert updates
    assert not unmoved()


# What the rules are worth: each cheat breaks the one that is meant for it -----------------------------------------


def adapt_then_score(tokens):
    """Trains on a chunk, then scores it."""
    net, nats = lively_net(), []
    for chunk in chunks(tokens):
        alone = chunk._replace(index=0, n_chunks=2)
        cheat = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**ADAPT))
        cheat.score_chunk(alone)
        cheat.adapt_chunk(alone)
        nats.append(ScoreFirstTTT(net, SEQ_LEN, TTTConfig(epochs=0)).score_chunk(alone).nats)
    return torch.cat(nats)


def best_of_two_passes(tokens):
    """Scores the stream twice and keeps each token's better score."""
    first = evaluation(**ADAPT)(tokens)
    net, again = lively_net(), []
    for pass_index in range(2):
        ttt = ScoreFirstTTT(net, SEQ_LEN, TTTConfig(**ADAPT))
        for chunk in chunks(tokens):
            scored = ttt.score_chunk(chunk)
            again += [scored.nats] if pass_index else []
            ttt.adapt_chunk(chunk)
    return torch.minimum(first, torch.cat(again))


def hint_of_the_target(tokens):
    """Lowers every nat a little: no longer a distribution."""
    return evaluation(**ADAPT)(tokens) * 0.9


def drops_the_tail(tokens):
    """Leaves out what fills no sequence, as the reference does."""
    return evaluation(drop_partial=True, **ADAPT)(tokens)


@pytest.mark.parametrize(("cheat", "rule", "message"), [
    (adapt_then_score, check_past_is_fixed, "changed a score before it"),
    (best_of_two_passes, check_past_is_fixed, "changed a score before it"),
    (hint_of_the_target, check_distribution, "sum to"),
    (drops_the_tail, check_each_token_once, ""),
])
def test_a_cheat_is_caught(cheat, rule, message):
    with pytest.raises(AssertionError, match=message):
        rule(cheat)


# Two ranks ---------------------------------------------------------------------------------------------------------


ON_TWO_RANKS = (*MODES, "low rank, carried")


def _two_ranks(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name in ON_TWO_RANKS:
        score = evaluation(**ALL[name])
        check_past_is_fixed(score, (25, 61))
        torch.save(score(stream()), f"{folder}/{name}-{rank}.pt")
    check_each_token_once(evaluation(**ALL["carried"]))
    check_distribution(evaluation(**ALL["carried"]), (61,))
    with pytest.raises(AssertionError, match="changed a score before it"):
        check_past_is_fixed(adapt_then_score, (20,))


@pytest.mark.ddp
def test_two_ranks_obey_the_rules_and_agree(tmp_path):
    run_ranks(_two_ranks, str(tmp_path))
    for name in ON_TWO_RANKS:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second), name
    one = evaluation(**(ADAPT | {"batch_seqs": 4}))(stream())
    assert torch.allclose(torch.load(tmp_path / "cold-0.pt"), one, atol=1e-4)


def _carried_without_adaptation(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for warm in (0, 5, 1000):
        scored = score_first_ttt(lively_net(), chunks(stream()), SEQ_LEN,
                                 TTTConfig(mode="carried", epochs=0, warm_tokens=warm))
        torch.save(torch.cat([chunk.nats for chunk in scored]), f"{folder}/{warm}-{rank}.pt")
        # A span's first target comes from one token and those that warmed its state.
        contexts = [chunk.context for chunk in scored]
        assert contexts[0][:CHUNK // 2].tolist() == list(range(1, CHUNK // 2 + 1))
        assert contexts[1][0] == min(warm, CHUNK) + 1
        assert contexts[1][CHUNK // 2] == min(warm, CHUNK * 3 // 2) + 1


@pytest.mark.ddp
def test_two_ranks_differ_from_one_only_by_the_tokens_before_the_warm_up(tmp_path):
    """With all tokens as warm-up two ranks give one rank's score; with fewer, each rank's span starts knowing less."""
    run_ranks(_carried_without_adaptation, str(tmp_path))
    one = evaluation(mode="carried", epochs=0)(stream())
    everything = torch.load(tmp_path / "1000-0.pt")
    assert torch.allclose(everything, one, atol=1e-4)
    few = torch.load(tmp_path / "5-0.pt")
    half = CHUNK // 2
    with torch.no_grad():
        span = stream()[half - 5:CHUNK + 1][None]
        expected = lively_net()(span[:, :-1], span[:, 1:], reduction="none")[0, 5:]
    assert torch.allclose(few[half:CHUNK], expected, atol=1e-4)
    # Rank 0's first span is the stream's start, where there is nothing to miss.
    assert torch.allclose(few[:CHUNK // 2], one[:CHUNK // 2], atol=1e-4)
    differs = (few - one).abs() > 1e-4
    assert bool(differs[CHUNK // 2:CHUNK].any())
    assert not torch.allclose(torch.load(tmp_path / "0-0.pt"), few, atol=1e-3)
