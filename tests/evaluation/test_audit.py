"""Curves by context and document position, the file of nats, the words for a mode's context."""

import math

import numpy as np
import pytest
import torch
from legality import CHUNK, MODES, SEQ_LEN, chunks, lively_net, stream

from hymba_lightning.evaluation import TTTConfig, score_first_ttt
from hymba_lightning.evaluation.audit import StreamAudit, describe_context
from hymba_lightning.evaluation.curve import MIN_TOKENS, ContextCurve, CurvePoint, DocumentPosition
from hymba_lightning.plots import plot_context


def test_bins_double_and_sum_in_double_precision():
    curve = ContextCurve()
    context = torch.tensor([1, 2, 3, 4, 7, 8, 1 << 20, (1 << 20) - 1])
    nats = torch.arange(1.0, 9.0)
    curve.add(context[:3], nats[:3], torch.full((3,), 2))
    curve.add(context[3:], nats[3:], torch.full((5,), 3))
    got = {point.at_least: (point.n_tokens, point.bpb) for point in curve.points()}
    assert {k: v[0] for k, v in got.items()} == {1: 1, 2: 2, 4: 2, 8: 1, 1 << 19: 1, 1 << 20: 1}
    assert got[2][1] == pytest.approx((2 + 3) / (math.log(2) * 4))
    assert got[4][1] == pytest.approx((4 + 5) / (math.log(2) * 6))


def test_powers_of_two_fall_into_their_own_bin():
    for power in range(30):
        curve = ContextCurve()
        curve.add(torch.tensor([(1 << power), (2 << power) - 1]), torch.ones(2), torch.ones(2))
        assert [point.at_least for point in curve.points()] == [1 << power]


def test_document_positions_go_on_over_chunks():
    tokens = stream()
    whole = DocumentPosition(1).of_targets(tokens)
    counted, since = [], 0
    for token in tokens[:-1].tolist():
        since = 1 if token == 1 else since + 1
        counted.append(since)
    assert whole.tolist() == counted
    parts = DocumentPosition(1)
    assert torch.cat([parts.of_targets(chunk.tokens) for chunk in chunks(tokens)]).tolist() == counted


@pytest.mark.parametrize("mode", MODES)
def test_the_file_holds_every_nat_in_order(tmp_path, mode):
    config = TTTConfig(epochs=1, freeze_blocks=0, **MODES[mode])
    pieces = chunks(stream())
    scored = score_first_ttt(lively_net(), pieces, SEQ_LEN, config)
    audit = StreamAudit(tmp_path, bos_id=1, keep_nats=True)
    for chunk, score in zip(pieces, scored, strict=True):
        audit.add(chunk, score)
    summary = audit.finish()
    nats = np.load(tmp_path / "nats.npy")
    assert nats.dtype == np.float32
    assert torch.equal(torch.from_numpy(nats), torch.cat([score.nats for score in scored]))
    assert [path.name for path in tmp_path.iterdir()] == ["nats.npy"]
    for curve in ("bpb_by_context", "bpb_by_document_position"):
        bits = sum(point["bpb"] * 3 * point["n_tokens"] for point in summary[curve])
        assert bits * math.log(2) == pytest.approx(float(nats.astype(np.float64).sum()), rel=1e-6)
        assert sum(point["n_tokens"] for point in summary[curve]) == stream().numel() - 1


def test_a_bins_error_is_the_spread_of_its_score():
    """Against many draws of the same bin."""
    generator = torch.Generator().manual_seed(0)
    points = []
    for _ in range(400):
        curve = ContextCurve()
        n_bytes = torch.randint(1, 7, (300,), generator=generator)
        nats = n_bytes * 0.9 + torch.rand(300, generator=generator) * 3
        curve.add(torch.ones(300), nats, n_bytes)
        points += curve.points()
    spread = float(np.std([point.bpb for point in points]))
    assert np.mean([point.error for point in points]) == pytest.approx(spread, rel=0.1)


def test_bins_of_a_handful_of_tokens_are_not_drawn(tmp_path):
    thin, thick = CurvePoint(1, 9.0, MIN_TOKENS - 1), CurvePoint(8, 2.0, MIN_TOKENS, 0.1)
    assert plot_context([thin], [thin], tmp_path / "a.png", "cold") is None
    assert list(tmp_path.iterdir()) == []
    # A thin bin changes nothing in the picture.
    with_it, without = (
        plot_context(points, [], tmp_path / name, "cold").read_bytes()
        for name, points in (("b.png", [thin, thick]), ("c.png", [thick]))
    )
    assert with_it == without


def test_a_stream_that_is_one_sequence_says_nothing_of_contexts(tmp_path):
    def curve(n_texts):
        gathered = ContextCurve()
        for _ in range(n_texts):
            gathered.add(torch.arange(1, 2048), torch.rand(2047) + 2, torch.ones(2047))
        return gathered.points()

    assert plot_context(curve(1), [], tmp_path / "one.png", "carried") is None
    assert plot_context(curve(4), [], tmp_path / "four.png", "cold").is_file()


def test_without_asking_no_file_is_written(tmp_path):
    audit = StreamAudit(tmp_path, bos_id=1, keep_nats=False)
    assert audit.finish()["nats_file"] is None
    assert not list(tmp_path.iterdir())


def test_a_dropped_tail_leaves_the_positions_right(tmp_path):
    pieces = chunks(stream())
    scored = score_first_ttt(lively_net(), pieces, SEQ_LEN, TTTConfig(epochs=0, drop_partial=True))
    audit = StreamAudit(tmp_path, bos_id=1, keep_nats=False)
    for chunk, score in zip(pieces, scored, strict=True):
        audit.add(chunk, score)
    assert sum(point["n_tokens"] for point in audit.finish()["bpb_by_context"]) == 3 * (CHUNK // SEQ_LEN * SEQ_LEN)


def test_the_words_say_how_ranks_differ():
    carried = TTTConfig(mode="carried", epochs=0, warm_tokens=77)
    assert "all tokens before it" in describe_context(carried, 24, 1)
    two = describe_context(carried, 24, 2)
    assert "2 contiguous spans" in two
    assert "at least 77" in two
    assert "forgotten" in describe_context(TTTConfig(), 24, 1)
    assert "at least 17 tokens" in describe_context(TTTConfig(mode="sliding", stride=7), 24, 1)
    assert "made anew" in describe_context(TTTConfig(mode="carried", state_after_update="rewarm"), 24, 1)
