"""The rules of the score, held on the public evaluation function in every mode and with every way to adapt."""

import pytest
import torch
from cheats import CHEATS, counts, trained_first
from legality import (
    ADAPT,
    CHUNK,
    MODES,
    N_TOKENS,
    SEQ_LEN,
    VARIANTS,
    VOCAB,
    chunks,
    evaluation,
    lively_net,
    stream,
)
from tiny_lightning import run_ranks

from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig, score_first_ttt
from hymba_lightning.evaluation.adapt import Adapter
from hymba_lightning.evaluation.auditor import PAST_FIXED, RuleBrokenError, audit

ALL = {
    **{name: ADAPT | mode for name, mode in MODES.items()},
    **{f"{name}, carried": ADAPT | MODES["carried"] | variant for name, variant in VARIANTS.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_an_honest_evaluation_passes_the_audit(name):
    # How a token is scored is the mode's affair: what adapts, and how, changes no sum over all ids.
    sums = int(name in MODES)
    report = audit(evaluation(**ALL[name]), stream(), VOCAB, past_positions=6, distribution_positions=sums)
    assert report.tokens == N_TOKENS
    assert len(report.past_positions) == 6


@pytest.mark.parametrize("n_tokens", [2, CHUNK, CHUNK + 1, CHUNK + 2, N_TOKENS])
@pytest.mark.parametrize("name", ALL)
def test_each_token_is_scored_once(name, n_tokens):
    nats = evaluation(**ALL[name])(stream(n_tokens))
    assert nats.shape == (n_tokens - 1,)
    assert bool((nats > 0).all())


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


# What the rules are worth: each cheat is caught, whatever it is disguised as ---------------------------------------


CASES = [(kind, disguise) for kind, disguises in CHEATS.items() for disguise in disguises]


@pytest.mark.parametrize(("kind", "disguise"), CASES)
def test_a_cheat_is_caught_and_its_rule_named(kind, disguise):
    make, rules = CHEATS[kind][disguise]
    # What shows in the past does so without many sums over all ids.
    sums = 1 if PAST_FIXED in rules else 8
    with pytest.raises(RuleBrokenError, match="rule broken: ") as broken:
        audit(make(), stream(), VOCAB, past_positions=40, distribution_positions=sums)
    assert broken.value.rule in rules


def test_a_cheat_of_the_first_call_is_caught_whatever_is_drawn():
    make, _ = CHEATS["knows when it is watched"]["first call"]
    for seed in range(40):
        with pytest.raises(RuleBrokenError):
            audit(make(), stream(), VOCAB, past_positions=4, distribution_positions=1, seed=seed)


def test_there_are_twelve_cheats_of_six_kinds_and_their_honest_part_passes():
    assert len(CHEATS) == 6
    assert len(CASES) >= 12
    assert all(len(disguises) >= 3 for disguises in CHEATS.values())
    for seed in range(5):
        audit(counts, stream(), VOCAB, past_positions=20, distribution_positions=4, seed=seed)


def test_an_audit_draws_from_the_whole_stream_anew_each_time_and_repeats_by_its_seed():
    for nothing in (None, "0.5", [[1.0], [2.0, 3.0]]):
        with pytest.raises(RuleBrokenError, match="every token once: the scores are no numbers, but"):
            audit(lambda tokens, given=nothing: given, stream(), VOCAB)
    reports = [audit(counts, stream(), VOCAB, seed=seed) for seed in (None, None, 7, 7)]
    assert reports[0].past_positions != reports[1].past_positions
    assert reports[2].past_positions == reports[3].past_positions
    for report in reports:
        stretches = [(position - 1) * 24 // (N_TOKENS - 1) for position in report.past_positions]
        assert len(set(stretches)) >= 15, "some part of the stream was never tried"
        assert report.distribution_positions[-1] == N_TOKENS - 1
        assert len(set(report.distribution_positions)) == 4, "three drawn, and the last"
        assert "kept: a full distribution" in str(report)


def test_a_probe_is_asked_for_sums_and_held_against_whole_evaluations():
    def one(tokens, position):
        return float(counts(tokens)[position - 1])

    report = audit(counts, stream(), VOCAB, distribution_positions=2, probe=one)
    assert (report.probes, report.evaluations) == (3 * VOCAB, 3 + 24 + 4 + 3 * 8)
    assert f"and {3 * VOCAB} of one token in" in str(report)

    def sure(tokens):
        nats = counts(tokens)
        return torch.cat([nats[:-1], 0.9 * nats[-1:]])

    for evaluate, probe, what in (
        (sure, one, "as token 196 has .* nats where nothing is scored after its chunk"),
        (counts, lambda tokens, position: float(sure(tokens)[position - 1]), "nothing is scored after its chunk"),
        (sure, lambda tokens, position: float(sure(tokens)[position - 1]), "as token 196 sum to"),
        (counts, lambda tokens, position: float("nan"), "has nan nats"),
    ):
        with pytest.raises(RuleBrokenError, match=what):
            audit(evaluate, stream(), VOCAB, distribution_positions=1, probe=probe, seed=1)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (stream(5), {}),
        (stream() + 30, {}),
        (stream()[None], {}),
        (stream(), {"past_positions": 0}),
        (stream(), {"distribution_positions": -1}),
    ],
)
def test_an_audit_of_nothing_is_refused(tokens, options):
    with pytest.raises(ValueError, match="an audit needs"):
        audit(counts, tokens, VOCAB, **options)


# Tokens, not only numbers -------------------------------------------------------------------------------------------


def ttt_of(tokens=None) -> ScoreFirstTTT:
    return ScoreFirstTTT(lively_net(), SEQ_LEN, TTTConfig(**ADAPT), stream=tokens)


def test_the_tokens_of_another_chunk_are_refused_under_any_number():
    pieces = chunks(stream())
    with pytest.raises(ValueError, match="tokens from 60 on, where 0 is due"):
        ttt_of().score_chunk(pieces[1]._replace(index=0))
    with pytest.raises(ValueError, match="does not hold the stream's tokens 0 to 60"):
        ttt_of(stream()).score_chunk(pieces[1]._replace(index=0, start=0))
    for forged, match in (
        (pieces[0]._replace(index=1), "tokens from 0 on, where 60 is due"),
        (pieces[0]._replace(index=1, start=None), "does not go on where"),
        (pieces[2]._replace(index=1), "tokens from 120 on"),
        (pieces[3]._replace(index=1, start=None), "does not go on where"),
        (pieces[1]._replace(n_chunks=9), "does not go on where"),
        (pieces[1]._replace(tokens=pieces[1].tokens[:30]), "byte counts for 60"),
    ):
        ttt = ttt_of()
        ttt.score_chunk(pieces[0])
        ttt.adapt_chunk(pieces[0])
        with pytest.raises(ValueError, match=match):
            ttt.score_chunk(forged)
        ttt.score_chunk(pieces[1])  # nothing was lost


def test_the_stream_finds_one_changed_token_and_a_wrong_end():
    pieces = chunks(stream())
    changed = pieces[0].tokens.clone()
    changed[40] = (changed[40] + 1) % VOCAB
    with pytest.raises(ValueError, match="does not hold the stream's"):
        ttt_of(stream()).score_chunk(pieces[0]._replace(tokens=changed))
    with pytest.raises(ValueError, match="of a stream of 197"):
        ttt_of(stream()).score_chunk(pieces[0]._replace(n_chunks=1))


def test_adapting_takes_the_tokens_that_were_scored():
    pieces = chunks(stream())
    ttt = ttt_of()
    ttt.score_chunk(pieces[0])
    with pytest.raises(ValueError, match="other tokens now than when it was scored"):
        ttt.adapt_chunk(pieces[1]._replace(index=0, start=0))
    tokens = stream()
    ttt, mine = ttt_of(), chunks(tokens)[0]
    ttt.score_chunk(mine)
    tokens[10] = (tokens[10] + 1) % VOCAB  # in place, under the same object
    with pytest.raises(ValueError, match="other tokens now"):
        ttt.adapt_chunk(mine)


def test_a_stream_that_ends_early_is_no_score():
    with pytest.raises(ValueError, match="2 chunks were scored, and 4 are the whole stream"):
        score_first_ttt(lively_net(), chunks(stream())[:2], SEQ_LEN, TTTConfig(epochs=0))


# Two ranks ---------------------------------------------------------------------------------------------------------


ON_TWO_RANKS = (*MODES, "low rank, carried")


def _two_ranks(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name in ON_TWO_RANKS:
        score = evaluation(**ALL[name])
        # The sum over all ids takes most of the time: one rank tries it in every mode, two in one.
        sums = int(name == "carried")
        audit(score, stream(2 * CHUNK), VOCAB, past_positions=3, distribution_positions=sums, seed=1)
        torch.save(score(stream()), f"{folder}/{name}-{rank}.pt")
    with pytest.raises(RuleBrokenError):
        audit(trained_first, stream(), VOCAB, seed=1)


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
        scored = score_first_ttt(
            lively_net(), chunks(stream()), SEQ_LEN, TTTConfig(mode="carried", epochs=0, warm_tokens=warm)
        )
        torch.save(torch.cat([chunk.nats for chunk in scored]), f"{folder}/{warm}-{rank}.pt")
        # A span's first target comes from one token and those that warmed its state.
        contexts = [chunk.context for chunk in scored]
        assert contexts[0][: CHUNK // 2].tolist() == list(range(1, CHUNK // 2 + 1))
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
        span = stream()[half - 5 : CHUNK + 1][None]
        expected = lively_net()(span[:, :-1], span[:, 1:], reduction="none")[0, 5:]
    assert torch.allclose(few[half:CHUNK], expected, atol=1e-4)
    # Rank 0's first span is the stream's start, where there is nothing to miss.
    assert torch.allclose(few[: CHUNK // 2], one[: CHUNK // 2], atol=1e-4)
    differs = (few - one).abs() > 1e-4
    assert bool(differs[CHUNK // 2 : CHUNK].any())
    assert not torch.allclose(torch.load(tmp_path / "0-0.pt"), few, atol=1e-3)
