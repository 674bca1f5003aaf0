"""The evaluation's clock: epochs are lowered, the limit is kept, all ranks decide alike."""

import pytest
import torch
from legality import CHUNK, N_TOKENS, SEQ_LEN, chunks, lively_net, stream
from tiny_lightning import FakeTime, run_ranks

from hymba_lightning.evaluation import ScoreFirstTTT, TTTConfig
from hymba_lightning.evaluation.adapt import Adapter
from hymba_lightning.evaluation.clock import EvaluationClock

N_CHUNKS = 4
SIXTEENTH = -(-(N_TOKENS - 1) // 16)


def timed_evaluation(
    monkeypatch,
    limit,
    score_seconds=1.0,
    update_seconds=1.0,
    epochs=5,
    slow_after=None,
    rank_offset=0.0,
    chunk_tokens=CHUNK,
    compiling=0.0,
):
    """Runs the stream on a clock that only scoring and updates move; the first of each takes `compiling` longer."""
    time = FakeTime(now=100.0 + rank_offset)
    original = Adapter.update
    n_updates = 0

    def update(self, lr, loss):
        nonlocal n_updates
        n_updates += 1
        time.advance(compiling if n_updates == 1 else 0.0)
        time.advance(update_seconds * (3 if slow_after is not None and n_updates > slow_after else 1))
        return original(self, lr, loss)

    monkeypatch.setattr(Adapter, "update", update)
    ttt = ScoreFirstTTT(lively_net(), SEQ_LEN, TTTConfig(epochs=epochs, freeze_blocks=0, limit_seconds=limit), time)
    plain, n_scorings = type(ttt.scorer).score, 0

    def score(self, tokens):
        nonlocal n_scorings
        n_scorings += 1
        ttt.n_scorings = n_scorings
        time.advance(score_seconds + (compiling if n_scorings == 1 else 0.0))
        return plain(self, tokens)

    monkeypatch.setattr(type(ttt.scorer), "score", score)
    for chunk in chunks(stream(), chunk_tokens):
        ttt.score_chunk(chunk)
        ttt.adapt_chunk(chunk)
    monkeypatch.undo()
    return ttt


def timed_run(monkeypatch, limit, **timing):
    """Seconds used and epochs per chunk."""
    ttt = timed_evaluation(monkeypatch, limit, **timing)
    return ttt.clock.elapsed(), ttt.epochs_done


def test_without_a_limit_every_epoch_runs(monkeypatch):
    seconds, epochs = timed_run(monkeypatch, None)
    assert epochs == [5, 5, 5, 0]
    assert seconds == pytest.approx(4 + 15)


def test_time_enough_lowers_nothing(monkeypatch):
    assert timed_run(monkeypatch, 1000.0)[1] == [5, 5, 5, 0]


@pytest.mark.parametrize("limit", [6.0, 8.0, 10.0, 12.5, 15.0])
def test_epochs_are_lowered_and_the_limit_is_kept(monkeypatch, limit):
    seconds, epochs = timed_run(monkeypatch, limit)
    assert seconds <= limit
    assert sum(epochs) < 15
    # What could be used was used: another epoch would not have fitted, margins aside.
    assert seconds > limit - 4.0
    if limit > 12:
        assert max(epochs) - min(epochs[:-1]) <= 1, "the time was not shared out evenly"


def test_scoring_alone_may_fill_the_limit(monkeypatch):
    seconds, epochs = timed_run(monkeypatch, 4.2)
    assert epochs == [0, 0, 0, 0]
    assert seconds == pytest.approx(4)


def test_epochs_that_get_slower_stop_earlier(monkeypatch):
    """Seven fast updates, then slow ones: the run overshoots by at most the one epoch that was slower than known."""
    seconds, epochs = timed_run(monkeypatch, 20.0, slow_after=3)
    assert seconds <= 20.0 + 2.0
    assert sum(epochs) < 15


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_start_that_compiles_costs_no_chunk_its_training(monkeypatch, epochs):
    """Scoring takes 20 seconds the first time and a tenth afterwards, an update likewise: sixteen times as long would
    be far over the limit. Weights, and so the score, must not depend on what was compiled before."""
    ttt = timed_evaluation(
        monkeypatch, 100.0, score_seconds=0.1, update_seconds=0.1, epochs=epochs, chunk_tokens=SIXTEENTH, compiling=20.0
    )
    assert ttt.epochs_done == [epochs] * 15 + [0]
    assert ttt.clock.elapsed() < 60
    assert len(ttt.clock.scorings) == 16


@pytest.mark.parametrize("scoring", [5.0, 5.7, 5.9, 6.0, 6.1, 6.25])
def test_a_second_look_at_scoring_does_not_exceed_a_limit_that_was_kept(monkeypatch, scoring):
    seconds = timed_run(monkeypatch, 100.0, score_seconds=scoring, chunk_tokens=SIXTEENTH)[0]
    assert 16 * scoring - 1e-9 <= seconds <= 100.0


@pytest.mark.parametrize(("scoring", "more_at_first"), [(6.1, 0.5), (5.95, -0.2)])
def test_nor_where_the_first_scoring_took_a_little_more_or_less_than_the_others(monkeypatch, scoring, more_at_first):
    seconds, _ = timed_run(monkeypatch, 100.0, score_seconds=scoring, compiling=more_at_first, chunk_tokens=SIXTEENTH)
    assert seconds == pytest.approx(16 * scoring + more_at_first)


def test_a_first_epoch_is_taken_to_compile_as_long_as_the_first_scoring_did(monkeypatch):
    seconds, _ = timed_run(
        monkeypatch, 60.0, score_seconds=0.1, update_seconds=0.1, compiling=30.0, chunk_tokens=SIXTEENTH
    )
    assert seconds <= 60


def test_scoring_is_looked_at_again_once(monkeypatch):
    clock = EvaluationClock(100.0, torch.device("cpu"), FakeTime(now=0.0))
    clock.note_scoring(20.0, 64)
    assert clock.needs_second_look(now=20.0, chunks_left=15)
    clock.note_second_look(0.1)
    assert not clock.needs_second_look(now=20.1, chunks_left=15)
    ttt = timed_evaluation(monkeypatch, 40.0, chunk_tokens=SIXTEENTH)
    assert (ttt.n_scorings, ttt.clock.elapsed() <= 40.0) == (17, True)


def test_where_nothing_can_keep_the_limit_one_look_more_is_all_it_costs(monkeypatch):
    seconds, epochs = timed_run(monkeypatch, 100.0, score_seconds=10.0, chunk_tokens=SIXTEENTH)
    assert (seconds, epochs) == (170.0, [0] * 16)


def _ranks(rank, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    # Rank 1's own clock would forbid everything: it runs ten times as fast.
    with pytest.MonkeyPatch.context() as monkeypatch:
        seconds, epochs = timed_run(
            monkeypatch,
            10.0,
            score_seconds=1.0 if rank == 0 else 10.0,
            update_seconds=1.0 if rank == 0 else 10.0,
            rank_offset=rank * 1e6,
        )
    torch.save((seconds, epochs), f"{folder}/{rank}.pt")


@pytest.mark.ddp
def test_ranks_agree_on_the_time_whatever_their_clocks_say(tmp_path):
    run_ranks(_ranks, str(tmp_path))
    (seconds, epochs), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert other == (seconds, epochs)
    assert seconds <= 10
    assert sum(epochs) > 0


def test_where_the_time_went_is_told_as_sums_and_medians(monkeypatch):
    ttt = timed_evaluation(monkeypatch, None, score_seconds=2.0, update_seconds=0.25, epochs=2, slow_after=5)
    n_tokens = [chunk.tokens.numel() - 1 for chunk in chunks(stream())]
    seconds = ttt.clock.summary()
    updates = [0.25] * 5 + [0.75]
    assert seconds["scoring_seconds"] == pytest.approx(2.0 * N_CHUNKS)
    assert seconds["training_seconds"] == pytest.approx(sum(updates))
    assert seconds["scored_tokens_per_s"] == pytest.approx(sorted(n_tokens)[N_CHUNKS // 2] / 2.0)
    assert seconds["update_ms"] == pytest.approx(250)


def test_what_was_not_done_has_no_rate(monkeypatch):
    seconds = timed_evaluation(monkeypatch, None, epochs=0).clock.summary()
    assert (seconds["training_seconds"], seconds["update_ms"]) == (0, None)
    assert seconds["scored_tokens_per_s"] > 0
