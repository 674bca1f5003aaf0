"""Whose files: a run's folder, whatever its logger, and what is refused without harm to another run."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only
from tiny_runs import copied, hymba

from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.cli import run as cli_run
from hymba_lightning.run import Run, RunRecord
from hymba_lightning.run.folder import RunExistsError


@pytest.mark.parametrize(
    "logger",
    [
        pytest.param(["--trainer.logger", "CSVLogger"], marks=pytest.mark.more),
        [
            "--trainer.logger",
            "lightning.pytorch.loggers.CSVLogger",
            "--trainer.logger.init_args.save_dir",
            "{work}/logs",
        ],
        ["--config", "{work}/two.yaml"],
        ["--trainer.logger", "TensorBoardLogger"],
    ],
    ids=["csv", "csv elsewhere", "two", "tensorboard"],
)
def test_a_runs_files_lie_in_its_folder_whatever_the_logger(work, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    both = [{"class_path": "CSVLogger"}, {"class_path": "TensorBoardLogger"}]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"trainer": {"logger": both}}))
    logger = [part.format(work=tmp_path) for part in logger]
    for name in ("a", "b"):
        cli_run(["fit", "--config", str(work / "tiny.yaml"), "--run_dir", f"runs/{name}", *logger])
    for name in ("a", "b"):
        files = {path.name for path in (tmp_path / "runs" / name).iterdir()}
        assert {"artifact.hymba", "summary.json", "record.json", "config.yaml", "checkpoints"} <= files
        if "TensorBoardLogger" in logger or "--config" in logger:
            assert any(name.startswith("events.out.tfevents") for name in files)
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "logs", "two.yaml"}
    cli_run(["test", "--config", str(work / "tiny.yaml"), "--run_dir", "runs/a", *logger, "--ckpt_path", "last"])
    assert (tmp_path / "runs" / "a" / "test_summary.json").is_file()


def test_a_logger_without_a_folder_of_its_own_is_left_alone(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli_run(
        ["fit", "--config", str(work / "tiny.yaml"), "--run_dir", "a", "--trainer.logger", f"{__name__}.NowhereLogger"]
    )
    assert (tmp_path / "a" / "summary.json").is_file()


class NowhereLogger(pl.loggers.logger.DummyLogger):
    """As MLflow's with a server: it has no folder."""

    @property
    def save_dir(self):
        return None


def test_another_runs_folder_is_not_overwritten_by_going_on_from_elsewhere(work, fitted, tmp_path):
    other = copied(fitted, tmp_path / "other")
    before = {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
    with pytest.raises(RunExistsError, match="another run's checkpoint"):
        hymba(work, "fit", other, "--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"), "--trainer.max_steps", "6")
    assert {path.name: path.stat().st_mtime_ns for path in other.iterdir()} == before
    assert hymba(
        work,
        "fit",
        tmp_path / "new",
        "--ckpt_path",
        str(fitted / "checkpoints" / "last.ckpt"),
        "--trainer.max_steps",
        "6",
    ).is_dir()


def test_what_is_refused_late_takes_nothing_away(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    with pytest.raises(ValueError, match="vocab_size"):
        hymba(work, "fit", folder, "--overwrite", "true", "--model.net.vocab_size", "512")
    assert (folder / "summary.json").read_bytes() == (fitted / "summary.json").read_bytes()
    assert (folder / "artifact.hymba").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ["--model.runtime.scan_backend", "triton"],
        ["--trainer.max_steps", "0"],
        ["--trainer.min_steps", "3", "--model.budget_seconds", "3"],
        ["--export.filename", "checkpoints/last.ckpt"],
        ["--export.filename", "."],
        ["--trainer.callbacks+", "LearningRateMonitor"],
    ],
    ids=["backend", "no steps", "least steps", "the checkpoint's name", "the folder's name", "another callback"],
)
def test_what_fails_before_its_first_step_leaves_the_old_run(work, fitted, tmp_path, options):
    folder = copied(fitted, tmp_path / "run")
    with pytest.raises(Exception):  # noqa: B017, PT011 - what each says is tested where it is raised
        hymba(work, "fit", folder, "--overwrite", "true", *options)
    for path in fitted.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert (folder / path.relative_to(fitted)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ["--model.net.vocab_size", "512"]),
        ("fit", ["--model.runtime.scan_backend", "triton"]),
        ("fit", ["--data.data_dir", "nowhere"]),
        ("test", ["--model.net.d_model", "64"]),
    ],
    ids=["in the setup", "before the first step", "before the callbacks", "a test of another network"],
)
def test_what_is_refused_leaves_no_folder(work, fitted, tmp_path, logger, command, options):
    if command == "test":
        options = [*options, "--ckpt_path", str(fitted / "checkpoints" / "last.ckpt")]
    with pytest.raises(Exception):  # noqa: B017, PT011 - what each says is tested where it is raised
        hymba(work, command, tmp_path / "runs" / "a", "--trainer.logger", logger, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_second_fit_leaves_nothing_beside_the_firsts_files(work, tmp_path):
    with FolderClaim(tmp_path / "run", "hymba fit"):
        before = {path.name for path in (tmp_path / "run").iterdir()}
        with pytest.raises(FolderInUseError):
            hymba(work, "fit", tmp_path / "run", "--trainer.logger", "CSVLogger")
        assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_of_test_results_takes_a_fit(work, fitted, tmp_path):
    folder = hymba(work, "test", tmp_path / "run", "--ckpt_path", str(fitted / "artifact.hymba"))
    before = (folder / "test_summary.json").read_bytes()
    hymba(work, "validate", folder, "--ckpt_path", str(fitted / "artifact.hymba"))
    hymba(work, "fit", folder, "--trainer.max_steps", "2")
    assert (folder / "test_summary.json").read_bytes() == before
    assert RunRecord.load(folder).tested() is None, "it is of other weights"


def test_without_checkpoints_none_is_written(work, tmp_path, monkeypatch):
    # A variable that a launcher left makes Lightning take a lone process for another rank.
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    options = ["--trainer.enable_checkpointing", "false", "--trainer.logger", "TensorBoardLogger"]
    folder = hymba(work, "fit", tmp_path / "run", *options)
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "artifact.hymba").is_file()
    assert not (folder / "checkpoints").exists()


def test_a_new_run_in_an_old_folder_shows_nothing_of_the_old(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    hymba(work, "test", folder, "--ckpt_path", str(folder / "artifact.hymba"))
    (folder / "training.png").write_bytes(b"")
    hymba(work, "fit", folder, "--overwrite", "true", "--export.enabled", "false", "--trainer.max_steps", "2")
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {"config.yaml", "record.json", "summary.json", "history.json", "checkpoints"}
    assert "artifact" not in json.loads((folder / "summary.json").read_text())


def test_two_runs_of_one_process_have_a_folder_each(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [cli_run(["fit", "--config", str(work / "tiny.yaml"), "--export.enabled", "false"]) for _ in range(2)]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    # Nothing of the first is in the second: neither its place nor what it trained.
    first, second = (Run.of(cli.trainer) for cli in runs)
    assert first is not second
    assert first.folder.path != second.folder.path
    assert first.history.tokens == second.history.tokens > 0
    assert all((cli.folder.path / "checkpoints" / "last.ckpt").is_file() for cli in runs)
