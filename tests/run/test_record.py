"""The record: what belongs together is found together, and nothing else is."""

import dataclasses
import json

import pytest
import torch

from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.run.record import ArtifactRecord, DataIdentity, RecordError, RunRecord, ScoreRecord

WEB, BOOKS = DataIdentity("web", "t"), DataIdentity("books", "t")
ARTIFACT = ArtifactRecord("artifact.hymba", "sha-a", 10, 5, 100, {})


def score(stage, weights="sha-a", data=WEB, tokens=100, **more):
    return ScoreRecord(stage, 200.0, tokens, 150, data, weights, **more)


def test_it_comes_back_from_its_file(tmp_path):
    scores = [score("artifact", settings={"seq_len": 64}), score("ttt", mode="carried")]
    record = RunRecord(None, ARTIFACT, scores, True, {"torch": "2"})
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert RunRecord.load(tmp_path / "nothing") == RunRecord()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"nats": 200.0', '"nats": "many"'),
        lambda text: text.replace('"tokens"', '"token"'),
        lambda text: text.replace('"bytes": 150', '"bytes": 0'),
    ],
    ids=["cut", "list", "version", "text", "field", "no bytes"],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    RunRecord(None, ARTIFACT, [score("artifact")]).save(tmp_path)
    path = tmp_path / "record.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match=r"record\.json"):
        RunRecord.load(tmp_path)


def test_the_artifacts_score_is_shown_only_of_the_artifact_that_is_there():
    record = RunRecord(None, ARTIFACT, [score("raw", "w"), score("artifact", "sha-of-another")])
    assert list(record.stages()) == ["raw"]
    record.add(score("artifact"))
    assert list(record.stages()) == ["raw", "artifact"]


@pytest.mark.parametrize(
    "tested",
    [
        score("ttt", data=BOOKS),
        score("ttt", tokens=99),
        score("ttt", "sha-b"),
        score("ttt", data=None),
    ],
    ids=["other text", "other length", "other weights", "unknown text"],
)
def test_a_score_without_adaptation_belongs_to_the_same_weights_and_text(tested):
    record = RunRecord(None, ARTIFACT, [score("artifact")])
    assert record.without_adaptation(score("ttt")) == score("artifact")
    assert record.without_adaptation(tested) is None


def test_a_test_of_another_artifact_is_not_the_runs():
    record = RunRecord(None, ARTIFACT, [score("ttt", "sha-of-before")])
    assert record.tested() is None
    record.add(score("ttt"))
    assert record.tested() == score("ttt")


def test_the_same_measurement_again_takes_the_olds_place():
    record = RunRecord()
    record.add(score("ttt"))
    record.add(dataclasses.replace(score("ttt"), nats=100.0))
    record.add(score("ttt", settings={"lr": 1}))
    assert [(s.nats, s.settings) for s in record.scores] == [(100.0, {}), (200.0, {"lr": 1})]
    assert json.dumps(dataclasses.asdict(record))


def test_weights_have_one_digest_whatever_their_order():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(3, dtype=torch.bfloat16)
    assert weights_sha256({"a": a, "b": b}) == weights_sha256({"b": b, "a": a.clone()})
    others = [{"a": a + 1e-6, "b": b}, {"a": a.reshape(3, 2), "b": b}, {"a": a, "c": b}, {"a": a, "b": b.float()}]
    assert len({weights_sha256(other) for other in [{"a": a, "b": b}, *others]}) == 5
