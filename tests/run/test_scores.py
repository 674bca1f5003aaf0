"""Whose numbers: every score is of the weights, tokens and data that it stands beside."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from tiny_runs import copied, hymba

from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.evaluation.score import Score
from hymba_lightning.evaluation.ttt import ChunkScore
from hymba_lightning.run import RunRecord
from hymba_lightning.run.run import Testing


def test_a_test_of_a_part_is_not_the_runs_score(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    artifact = ["--ckpt_path", str(folder / "artifact.hymba")]
    hymba(work, "test", folder, *artifact, "--trainer.limit_test_batches", "1")
    assert RunRecord.load(folder).tested() is None
    hymba(work, "test", folder, *artifact)
    assert RunRecord.load(folder).tested().tokens == 699


def test_a_score_without_adaptation_is_of_the_same_text(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    artifact = ["--ckpt_path", str(folder / "artifact.hymba")]
    hymba(work, "test", folder, *artifact)
    own = json.loads((folder / "test_summary.json").read_text())
    fit = json.loads((folder / "summary.json").read_text())
    assert own["bpb_without_adaptation"] == fit["bpb"]["artifact"]
    other = tmp_path / "other"
    shutil.copytree(work / "data", other)
    for manifest in other.glob("*.json"):
        manifest.unlink()
    write_shard(other / "tiny_val_000000.bin", np.random.default_rng(1).integers(300, 340, 700).astype(np.uint16))
    hymba(work, "test", folder, *artifact, "--data.data_dir", str(other))
    theirs = json.loads((folder / "test_summary.json").read_text())
    assert theirs["tokens"] == own["tokens"]
    assert theirs["data"] != own["data"]
    assert theirs["bpb_without_adaptation"] is None
    scores = [score for score in RunRecord.load(folder).scores if score.stage == "ttt"]
    assert [score.data.digest for score in scores] == [own["data"], theirs["data"]]
    assert scores[0].weights == own["weights_sha256"] == fit["artifact_sha256"]


def test_all_stages_are_scored_on_the_same_tokens(work, tmp_path):
    folder = hymba(
        work, "fit", tmp_path / "run", "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "2"
    )
    assert {score.tokens for score in RunRecord.load(folder).stages().values()} == {256}
    folder = hymba(work, "fit", tmp_path / "none", "--trainer.limit_val_batches", "0")
    assert RunRecord.load(folder).stages() == {}
    assert (folder / "artifact.hymba").is_file()


def test_tokens_are_those_that_were_trained_on(work, tmp_path):
    folder = hymba(
        work,
        "fit",
        tmp_path / "run",
        "--trainer.limit_train_batches",
        "7",
        "--trainer.max_steps",
        "-1",
        "--trainer.accumulate_grad_batches",
        "3",
        "--model.budget_seconds",
        "600",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (3, 7 * 128)


def test_a_chunk_without_a_byte_of_text_counts_with_the_one_beside_it():
    testing, empty = Testing(None), torch.empty(0)
    for nats, n_bytes in ((1.0, 0), (2.0, 4), (4.0, 0), (8.0, 3)):
        testing.add(ChunkScore(empty, empty, Score(nats, 1, n_bytes)))
        assert testing.total().bpb > 0, "infinity, but a number"
    assert testing.scores == [Score(7.0, 3, 4), Score(8.0, 1, 3)]
    assert testing.total() == Score(15.0, 4, 7)
