"""The end of a run and what comes after it: killed before it, ended, gone on with, refused."""

from __future__ import annotations

import re
import shutil
import warnings

import pytest
import yaml
from tiny_runs import copied, hymba

from hymba_lightning.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from hymba_lightning.run import RunRecord


def test_a_run_that_was_killed_before_its_end_is_ended_by_going_on(work, fitted, tmp_path):
    """Its last step was saved; artifact, record and summaries were not written."""
    folder = copied(fitted, tmp_path / "run")
    for name in ("artifact.hymba", "record.json", "summary.json", "history.json"):
        (folder / name).unlink()
    hymba(work, "fit", folder, "--ckpt_path", "last")
    assert (folder / "artifact.hymba").read_bytes() == (fitted / "artifact.hymba").read_bytes()
    one, other = (RunRecord.load(path) for path in (fitted, folder))
    assert other.finished
    assert [(s.stage, s.nats, s.weights) for s in other.scores] == [(s.stage, s.nats, s.weights) for s in one.scores]
    assert (one.trained.steps, one.trained.tokens) == (other.trained.steps, other.trained.tokens)
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_finished_run_is_left_as_it_is(work, fitted, tmp_path, caplog):
    folder = copied(fitted, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    hymba(work, "fit", folder, "--ckpt_path", "last")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {folder / ".lock"}
    record = folder / "record.json"
    record.write_text(record.read_text().replace('"ended_by": "max_steps"', '"ended_by": "callback"'))
    with caplog.at_level("INFO", "hymba_lightning"):
        hymba(work, "fit", folder, "--ckpt_path", "last")
    assert re.search(
        r"nothing is left to do; to train on, leave out the callback .*--trainer\.max_epochs 1", caplog.text
    )
    hymba(work, "fit", folder, "--ckpt_path", "last", "--export.quantization.bits", "4")
    assert RunRecord.load(folder).artifact.settings["quantization"]["bits"] == 4


def test_another_average_asked_for_at_the_end_is_exported(work, tmp_path):
    folder = hymba(work, "fit", tmp_path / "run", "--model.average_window", "0.9")
    stages = RunRecord.load(folder).stages()
    assert stages["raw"].weights != stages["ema"].weights
    hymba(work, "fit", folder, "--ckpt_path", "last", "--model.average", "none")
    again = RunRecord.load(folder).stages()
    assert list(again) == ["raw", "artifact"]
    assert again["raw"].weights == stages["raw"].weights
    assert again["artifact"].nats != stages["artifact"].nats


def test_an_artifact_under_a_new_name_takes_the_old_ones_place(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    hymba(work, "fit", folder, "--ckpt_path", "last", "--export.filename", "small.hymba")
    assert RunRecord.load(folder).artifact.file == "small.hymba"
    assert (folder / "small.hymba").read_bytes() == (fitted / "artifact.hymba").read_bytes()
    assert not (folder / "artifact.hymba").exists()
    (folder / "artifact.hymba").write_text("somebody's")
    hymba(work, "fit", folder, "--ckpt_path", "last", "--export.enabled", "false", "--trainer.max_steps", "5")
    assert RunRecord.load(folder).artifact is None
    assert not (folder / "small.hymba").exists()
    assert (folder / "artifact.hymba").read_text() == "somebody's"


def test_a_finished_run_goes_on_with_more_steps(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    hymba(work, "fit", folder, "--ckpt_path", "last", "--trainer.max_steps", "6")
    record = RunRecord.load(folder)
    assert record.finished
    assert record.trained.steps == 6
    assert record.trained.tokens == 6 * 128


def test_other_rates_are_applied_on_going_on(work, fitted, tmp_path, caplog):
    folder = copied(fitted, tmp_path / "run")
    hymba(
        work,
        "fit",
        folder,
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        "5",
        "--model.optimizer.matrix_lr",
        "0.5",
        "--model.optimizer.weight_decay",
        "0.3",
    )
    groups = {
        group["name"]: group
        for group in read_checkpoint(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    }
    muon = next(group for group in groups.values() if group["algorithm"] == "muon")
    assert (muon["base_lr"], muon["weight_decay"]) == (0.5, 0.3)


def test_a_checkpoint_of_another_tokenizer_is_refused(work, fitted, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(work / "data", other)
    model = (other / "tokenizer.model").read_bytes()
    # A field that no reader knows: another file of the same pieces.
    (other / "tokenizer.model").write_bytes(model + b"\xfa\x3f\x00")
    for command in ("test", "fit", "validate"):
        with pytest.raises(ValueError, match="another tokenizer"):
            hymba(
                work,
                command,
                copied(fitted, tmp_path / command),
                "--ckpt_path",
                "last",
                "--data.data_dir",
                str(other),
                *(["--trainer.max_steps", "6"] if command == "fit" else []),
            )


@pytest.mark.parametrize(
    "change",
    [
        lambda callbacks: callbacks.pop("WallClock"),
        lambda callbacks: callbacks["WallClock"].update(elapsed=-1e9),
        lambda callbacks: callbacks["WallClock"].update(elapsed=float("nan")),
    ],
    ids=["missing", "negative", "no number"],
)
def test_a_clock_that_cannot_be_is_refused(work, fitted, tmp_path, change):
    folder = copied(fitted, tmp_path / "run")
    last = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    change(checkpoint["callbacks"])
    write_checkpoint(last, checkpoint)
    with pytest.raises(CheckpointError, match="clock"):
        hymba(work, "fit", folder, "--ckpt_path", "last", "--trainer.max_steps", "6")


def test_another_seed_on_going_on_is_told_and_the_config_keeps_the_first(work, fitted, tmp_path):
    folder, more = copied(fitted, tmp_path / "run"), ("--ckpt_path", "last", "--trainer.max_steps")
    with pytest.warns(UserWarning, match="seed_everything 7 does nothing: this run was begun with 1337"):
        hymba(work, "fit", folder, *more, "5", "--seed_everything", "7")
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 1337
    # Also of the next part, and the same seed is no matter.
    with pytest.warns(UserWarning, match="seed_everything 8 does nothing: this run was begun with 1337"):
        hymba(work, "fit", folder, *more, "6", "--seed_everything", "8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="seed_everything")
        hymba(work, "fit", folder, *more, "7", "--seed_everything", "1337")
