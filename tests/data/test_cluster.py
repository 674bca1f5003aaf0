"""The parts of a cluster's tasks together are what `prepare` makes alone; a killed task is done again, alone."""

import dataclasses
import json
import os

import numpy as np
import pytest

from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.data.cluster import ClusterPrepare, prepare_on_cluster
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.shards import Shard, find_shards
from hymba_lightning.data.tokenizer import train_tokenizer

TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 89}" for k in range(30)) for number in range(50)]


@pytest.fixture
def job(tmp_path):
    model = tmp_path / "t.model"
    model.write_bytes(train_tokenizer(TEXTS, 300))
    (tmp_path / "in").mkdir()
    for index in range(10):
        lines = [json.dumps({"text": text}) for text in TEXTS[5 * index : 5 * index + 5]]
        (tmp_path / "in" / f"{index}.jsonl").write_text("\n".join([*lines, "{broken"]))
    return ClusterPrepare(
        [str(tmp_path / "in")], str(tmp_path / "out"), tokenizer=str(model), val_fraction=0.2, shard_tokens=400
    )


def documents(folder, split):
    """The split's documents as token tuples, sorted."""
    tokens = np.concatenate([Shard(path).read(0, Shard(path).n_tokens) for path in find_shards(f"*_{split}_*", folder)])
    return sorted(tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == 1)) if len(part))


def assert_as_alone(job, tmp_path):
    alone = prepare(
        job.inputs,
        str(tmp_path / "alone"),
        tokenizer=job.tokenizer,
        val_fraction=0.2,
        shard_tokens=400,
        workers=1,
        progress=False,
    ).manifest
    manifest = json.loads((job.folder / "manifest.json").read_bytes())
    for split in ("train", "val"):
        assert documents(job.folder, split) == documents(tmp_path / "alone", split)
        for key in ("documents", "text_bytes", "tokens"):
            assert manifest["splits"][split][key] == alone["splits"][split][key]
    assert manifest["train_token_counts"] == alone["train_token_counts"]
    # A part's border lies between two documents: what the unigram model scores differs by the first tokens only.
    assert manifest["unigram_bpb"] == pytest.approx(alone["unigram_bpb"], rel=0.02)
    assert manifest["skipped"]["count"] == 10
    data = HymbaDataModule(str(job.folder), seq_len=32, micro_batch_size=1)
    data.setup("fit")
    assert data.unigram_bpb is not None
    assert not job.parts.exists()


def test_tasks_together_are_prepare_alone(job, tmp_path):
    job.make_tokenizer()
    for rank in (2, 0):
        job(None, rank, 3)
    with pytest.raises(FileNotFoundError, match="parts 00001 of 3 are not finished"):
        job.merge(3)
    before = (job.parts / "00002" / "part.json").stat().st_mtime_ns
    for rank in range(3):
        job(None, rank, 3)
    assert (job.parts / "00002" / "part.json").stat().st_mtime_ns == before  # done already
    job.merge(3)
    assert_as_alone(job, tmp_path)


def test_more_tasks_than_files_and_a_part_without_validation(job, tmp_path):
    job.make_tokenizer()
    for rank in range(13):
        job(None, rank, 13)
    job.merge(13)
    assert_as_alone(job, tmp_path)


@pytest.mark.slow
def test_on_datatroves_local_executor(job, tmp_path):
    pytest.importorskip("datatrove")
    prepare_on_cluster(job, tasks=3, workers=2)
    assert_as_alone(job, tmp_path)
    with pytest.raises(FileExistsError, match="holds prepared data"):
        prepare_on_cluster(job, tasks=3, workers=2)


def test_a_missing_engine_and_bad_numbers_are_named(job, monkeypatch):
    with pytest.raises(ValueError, match="at least 1"):
        prepare_on_cluster(job, 0, 1)
    monkeypatch.setitem(__import__("sys").modules, "datatrove.executor", None)
    with pytest.raises(ImportError, match="pip install datatrove"):
        prepare_on_cluster(job, 1, 1)


def test_two_jobs_do_not_share_a_folder(job, tmp_path):
    job.make_tokenizer()
    with pytest.raises(FileExistsError, match="parts of another job"):
        dataclasses.replace(job, val_fraction=0.3).make_tokenizer()
    job.make_tokenizer()
    with FolderClaim(job.parts / "claims" / "00001", "the same task"), pytest.raises(FolderInUseError):
        job(None, 1, 3)
    for rank in range(3):
        job(None, rank, 3)
    with FolderClaim(job.folder, "hymba prepare"):
        with pytest.raises(FolderInUseError):
            job.merge(3)
        with pytest.raises(FolderInUseError):
            job.make_tokenizer()
    job.merge(3)
    assert_as_alone(job, tmp_path)


def test_a_merge_that_was_killed_is_finished(job, tmp_path, monkeypatch):
    job.make_tokenizer()
    for rank in range(3):
        job(None, rank, 3)
    move, left = os.replace, 4

    def killed(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            job.merge(3)
    with pytest.raises(ValueError, match="are being replaced"):
        HymbaDataModule(str(job.folder), seq_len=32).setup("fit")
    job.merge(3)
    assert_as_alone(job, tmp_path)
