"""Whole runs of a tiny network, by the command line's own functions and from Python: whose files, whose numbers."""

from __future__ import annotations

import json
import shutil
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tiny import NET, tiny_data, tiny_module, tiny_trainer, write_data
from torch.utils.data import DataLoader, TensorDataset

from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from hymba_lightning.cli import run as cli_run
from hymba_lightning.data.shards import write_shard
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.model import HymbaConfig
from hymba_lightning.run import Run, RunRecord
from hymba_lightning.run.folder import RunExistsError
from hymba_lightning.training.module import HymbaModule


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny data and the config of a tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "logger": False},
        "model": {
            "net": NET,
            "log_every_n_steps": 2,
            "compile_warmup_steps": 0,
            "ttt": {"epochs": 1, "freeze_blocks": 0},
        },
        "data": {"data_dir": str(folder / "data"), "seq_len": 64, "micro_batch_size": 2, "ttt_chunk_tokens": 256},
        "checkpoint": {"every_n_seconds": None},
        "summary": {"plots": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def hymba(work, command, run_dir, *options):
    """Runs a command; returns the run's folder."""
    cli_run([command, "--config", str(work / "tiny.yaml"), "--run_dir", str(work / run_dir), *options])
    return work / run_dir


@pytest.fixture(scope="module")
def fitted(work):
    return hymba(work, "fit", "fitted")


def copied(fitted, folder):
    shutil.copytree(fitted, folder)
    return folder


# Whose folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logger",
    [
        ["--trainer.logger", "CSVLogger"],
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
        ("test", ["--model.net.d_model", "64"]),
    ],
    ids=["in the setup", "before the first step", "a test of another network"],
)
def test_what_is_refused_leaves_no_folder(work, fitted, tmp_path, logger, command, options):
    if command == "test":
        options = [*options, "--ckpt_path", str(fitted / "checkpoints" / "last.ckpt")]
    with pytest.raises(Exception):  # noqa: B017, PT011 - what each says is tested where it is raised
        hymba(work, command, tmp_path / "runs" / "a", "--trainer.logger", logger, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_test_results_takes_a_fit(work, fitted, tmp_path):
    folder = hymba(work, "test", tmp_path / "run", "--ckpt_path", str(fitted / "artifact.hymba"))
    before = (folder / "test_summary.json").read_bytes()
    hymba(work, "validate", folder, "--ckpt_path", str(fitted / "artifact.hymba"))
    hymba(work, "fit", folder, "--trainer.max_steps", "2")
    assert (folder / "test_summary.json").read_bytes() == before
    assert RunRecord.load(folder).tested() is None, "it is of other weights"


def test_without_checkpoints_none_is_written(work, tmp_path):
    folder = hymba(work, "fit", tmp_path / "run", "--trainer.enable_checkpointing", "false")
    assert (folder / "artifact.hymba").is_file()
    assert not (folder / "checkpoints").exists()


def test_a_test_of_a_part_is_not_the_runs_score(work, fitted, tmp_path):
    folder = copied(fitted, tmp_path / "run")
    artifact = ["--ckpt_path", str(folder / "artifact.hymba")]
    hymba(work, "test", folder, *artifact, "--trainer.limit_test_batches", "1")
    assert RunRecord.load(folder).tested() is None
    hymba(work, "test", folder, *artifact)
    assert RunRecord.load(folder).tested().tokens == 699


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
    for _ in range(2):
        cli_run(["fit", "--config", str(work / "tiny.yaml"), "--export.enabled", "false"])
    assert len(list((tmp_path / "runs").iterdir())) == 2


# Whose numbers ---------------------------------------------------------------------------------------------------


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


# The end ---------------------------------------------------------------------------------------------------------


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


# Resuming --------------------------------------------------------------------------------------------------------


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


# Lightning's conventions -----------------------------------------------------------------------------------------


def test_overfitting_sees_the_same_batches_in_every_epoch(tmp_path):
    class Seen(pl.Callback):
        batches = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches = (*self.batches, batch.inputs.clone())

    seen = Seen()
    trainer = tiny_trainer(tmp_path, overfit_batches=2, max_steps=-1, max_epochs=3, callbacks=[seen])
    trainer.fit(tiny_module(budget_seconds=600), tiny_data(write_data(tmp_path / "data")))
    assert len(seen.batches) == 6
    for first, again in zip(seen.batches[:4], seen.batches[2:], strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_would_round_the_weights_is_refused(tmp_path, precision):
    with pytest.raises(ValueError, match=r"trainer\.precision is .*model\.runtime\.compute_dtype bfloat16"):
        tiny_trainer(tmp_path, precision=precision).fit(tiny_module(), tiny_data(write_data(tmp_path / "data")))


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(work, tmp_path):
    hymba(work, "fit", tmp_path / "run", "--trainer.callbacks+", "TQDMProgressBar", "--export.enabled", "false")
    assert TQDMProgressBar is not None


@pytest.mark.parametrize("option", ["--optimizer", "--lr_scheduler"])
def test_an_optimizer_of_ones_own_is_no_option(work, tmp_path, option):
    with pytest.raises((SystemExit, ValueError)):
        hymba(work, "fit", tmp_path / "run", option, "AdamW")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_module_comes_back_from_its_checkpoint(fitted):
    last = fitted / "checkpoints" / "last.ckpt"
    HymbaModule.load_from_checkpoint(last, net=HymbaConfig(**NET), runtime={"activation_checkpointing": True})
    module = HymbaModule.load_from_checkpoint(last)
    saved = read_checkpoint(fitted / "checkpoints" / "last.ckpt")["state_dict"]
    own = {name: value for name, value in module.state_dict().items() if name.startswith("net.")}
    assert all(torch.equal(value, saved[name]) for name, value in own.items())
    ids = torch.randint(300, 340, (2, 16))
    assert module(ids).shape == (2, 16, 1024)
    assert torch.equal(module(ids), module.net(ids))


def test_a_loader_of_pairs_trains_validates_and_predicts(tmp_path):
    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    module = tiny_module()
    trainer = tiny_trainer(tmp_path, max_steps=10, callbacks=[RunSummary(plots=False)], logger=CSVLogger(tmp_path))
    trainer.fit(module, pairs, pairs)
    record = Run.of(trainer).record
    assert record.trained.tokens == 10 * 4 * 64
    assert record.trained.data is None
    loss = trainer.validate(module, pairs, verbose=False)[0]["val/loss"]
    nats = torch.cat(trainer.predict(module, pairs))
    assert nats.shape == (20, 64)
    assert float(nats.mean()) == pytest.approx(loss, rel=1e-5)
    assert torch.cat(trainer.predict(module, DataLoader(ids, batch_size=4))).shape == (20, 65, 1024)
    with pytest.raises(TypeError, match=r"pair \(inputs, targets\)"):
        trainer.validate(module, DataLoader(ids.float().unsqueeze(-1), batch_size=4), verbose=False)


@pytest.mark.parametrize(
    ("options", "steps", "ended_by"),
    [
        ({"max_epochs": 3}, 15, "epochs"),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9, "epochs"),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, "epochs"),
        ({"max_epochs": 9, "max_steps": 7}, 7, "max_steps"),
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, None, "max_time"),
    ],
    ids=["epochs", "accumulated", "limited", "steps", "time"],
)
def test_what_ends_a_loader_ends_the_run_and_its_schedule(tmp_path, options, steps, ended_by):
    scales = []

    class Scales(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scales.append(Run.of(trainer).lr_scale)

    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    trainer = tiny_trainer(tmp_path, **({"max_steps": -1, "callbacks": [RunSummary(plots=False), Scales()]} | options))
    trainer.fit(tiny_module(), pairs)
    trained = RunRecord.load(tmp_path).trained
    assert trained.ended_by == ended_by
    assert steps in (trained.steps, None)
    assert scales[0] < max(scales) == pytest.approx(1.0, abs=0.1)
    assert scales[-1] < 0.5, "the warmdown knows where the end is"


def test_a_run_that_nothing_ends_is_refused(tmp_path):
    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    for data, options in ((tiny_data(write_data(tmp_path / "data")), {"max_epochs": 3}), (pairs, {"max_epochs": -1})):
        with pytest.raises(ValueError, match=r"nothing ends this run: set model\.budget_seconds"):
            tiny_trainer(tmp_path, max_steps=-1, **options).fit(tiny_module(), data)


def test_fit_then_test_from_python_is_one_run(tmp_path):
    module, data = tiny_module(), tiny_data(write_data(tmp_path / "data"))
    trainer = tiny_trainer(tmp_path / "run", callbacks=[ExportArtifact(), RunSummary(plots=False)])
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    record = RunRecord.load(tmp_path / "run")
    assert record == Run.of(trainer).record
    Run.of(trainer).started -= 1000  # what training took is not the evaluation's time
    trainer.test(module, data, verbose=False)
    assert RunRecord.load(tmp_path / "run").tested() is None  # the artifact was not tested, the weights were
    assert [score for score in Run.of(trainer).record.scores if score.stage == "ttt"][-1].seconds < 900
    tested = [score for score in record.scores if score.stage == "ttt"]
    assert tested[0].weights == record.stages()["ema"].weights
    assert record.without_adaptation(tested[0]) == record.stages()["ema"]


def test_an_evaluations_limit_is_of_everything_it_takes(tmp_path, monkeypatch):
    """Time that passes before the first chunk is part of it."""
    module = tiny_module(ttt=TTTConfig(limit_seconds=5.0, epochs=2, freeze_blocks=0))
    trainer = tiny_trainer(tmp_path, callbacks=[RunSummary(plots=False)])
    Run.of(trainer).command_started = time.monotonic() - 4.999
    trainer.test(module, tiny_data(write_data(tmp_path / "data")), verbose=False)
    summary = json.loads((tmp_path / "test_summary.json").read_text())
    assert summary["epochs_done"] == [0, 0, 0, 0]
    assert summary["seconds"] >= 4.999
