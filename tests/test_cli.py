"""The `hymba` command as a user runs it: configs, help, fit, resume, test of artifacts, clear refusals."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fit_process import finish, log_of, start, start_ranks, typed
from tiny import NET, write_data

from hymba_lightning.cli import run
from hymba_lightning.quantization import inspect_artifact

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny data and the config of a tiny run."""
    folder = tmp_path_factory.mktemp("cli")
    write_data(folder / "data")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6},
        "model": {
            "net": NET,
            "optimizer": {"warmdown_iters": 3},
            "ema_decay": 0.8,
            "log_every_n_steps": 2,
            "ttt": {"epochs": 1, "freeze_blocks": 1},
        },
        "data": {"data_dir": str(folder / "data"), "seq_len": 64, "micro_batch_size": 2, "ttt_chunk_tokens": 256},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def hymba(work: Path, command: str, run_dir: str, *options: str) -> Path:
    """Runs a command in this process; returns the run's folder."""
    run([command, "--config", str(work / "tiny.yaml"), "--run_dir", str(work / run_dir), *options])
    return work / run_dir


@pytest.fixture(scope="module")
def fitted(work):
    return hymba(work, "fit", "fitted", "--model.net.window", "12")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_understood(path, tmp_path):
    log = tmp_path / "log"
    assert finish([start(["fit", "--config", str(path), "--print_config"], log)]) == [0], log_of(log)
    assert_holds(yaml.safe_load(log_of(log)), yaml.safe_load(path.read_text()))


def assert_holds(resolved, given):
    """Every value that was given came through."""
    for name, value in given.items():
        if isinstance(value, dict):
            assert_holds(resolved[name], value)
        else:
            assert resolved[name] == value, name


def test_fit_leaves_config_checkpoint_artifact_summary_and_plot(fitted):
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    assert config["model"]["net"]["window"] == 12  # the flag won over the file
    assert config["model"]["net"]["d_model"] == 32
    assert (fitted / "checkpoints" / "last.ckpt").is_file()
    assert (fitted / "training.png").stat().st_size > 10_000
    assert list(fitted.glob("events.out.tfevents*"))
    summary = json.loads((fitted / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 2 * 64
    assert summary["scored_tokens"] == 699
    assert set(summary["bpb"]) == {"raw", "ema", "artifact"}
    assert summary["bpb"]["artifact"] == pytest.approx(summary["bpb"]["ema"], abs=0.01)
    assert summary["artifact_bytes"] == (fitted / "artifact.hymba").stat().st_size
    assert summary["artifact_bytes"] + summary["code_bytes"] < summary["limit_bytes"] == 16_000_000


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_the_documented_tags(fitted):
    tags = set(events_of(fitted).Tags()["scalars"])
    assert {
        "train/loss",
        "wall_clock/train_seconds",
        "wall_clock/tokens_per_s",
        "wall_clock/peak_memory_gb",
        "weights_lr/scale",
        "weights_lr/muon_momentum",
        "weights_lr/embed",
        "weights_lr/matrices",
        "weights_lr/scalars",
        "val/bpb",
        "val/loss",
        "val_by_tokens/bpb",
        "val_final/artifact_bpb",
    } <= tags


def test_tensorboard_shows_training_and_validation_first_after_a_validation_and_a_test_too(work, fitted, tmp_path):
    """It orders groups by name."""
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    for command in ("validate", "test"):
        hymba(work, command, str(folder), "--ckpt_path", str(folder / "artifact.hymba"))
    tags = events_of(folder).Tags()["scalars"]
    groups = sorted({tag.partition("/")[0] for tag in tags})
    assert groups == ["train", "val", "val_by_tokens", "val_final", "val_ttt", "wall_clock", "weights_lr"]
    assert {"val_ttt/running_bpb", "val_ttt/chunk_bpb", "val_final/ttt_bpb"} <= set(tags)


def test_tensorboard_has_the_hyper_parameters_with_the_final_scores(fitted):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = events_of(fitted)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["net.d_model"].number_value == 32
    assert options["seq_len"].number_value == 64
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert metrics == {f"val_final/{stage}_bpb" for stage in ("raw", "ema", "artifact", "ttt")}
    summary = json.loads((fitted / "summary.json").read_text())
    for stage, bpb in summary["bpb"].items():
        assert events.Scalars(f"val_final/{stage}_bpb")[-1].value == pytest.approx(bpb, rel=1e-6)


def test_the_artifact_is_tested_with_ttt(work, fitted):
    hymba(work, "test", "fitted", "--ckpt_path", str(fitted / "artifact.hymba"))
    result = json.loads((fitted / "test_summary.json").read_text())
    assert result["tokens"] == 699
    assert len(result["chunk_bpb"]) == 3
    assert result["bpb_without_adaptation"] == json.loads((fitted / "summary.json").read_text())["bpb"]["artifact"]
    assert 0 < result["ttt_bpb"] < result["bpb_without_adaptation"] + 0.01
    assert (fitted / "ttt.png").stat().st_size > 10_000
    assert (fitted / "test_config.yaml").is_file()
    assert yaml.safe_load((fitted / "config.yaml").read_text())["model"]["net"]["window"] == 12


def test_a_test_that_fails_leaves_the_options_of_an_earlier_one_beside_its_score(work, fitted, tmp_path, monkeypatch):
    run_dir = Path(shutil.copytree(fitted, tmp_path / "run"))
    artifact = str(run_dir / "artifact.hymba")
    hymba(work, "test", str(run_dir), "--ckpt_path", artifact)
    kept = [path for path in run_dir.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in kept]

    def fails(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("hymba_lightning.evaluation.ttt.ScoreFirstTTT.score_chunk", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        hymba(work, "test", str(run_dir), "--ckpt_path", artifact, "--model.ttt.epochs", "2")
    assert before == [path.read_bytes() for path in kept]


def test_scores_of_a_checkpoint_are_those_of_the_averaged_weights(work, fitted):
    ckpt = str(fitted / "checkpoints" / "last.ckpt")
    hymba(
        work,
        "test",
        "ckpt",
        "--ckpt_path",
        ckpt,
        "--model.ttt.epochs",
        "0",
        "--model.net.window",
        "12",
        "--data.ttt_chunk_tokens",
        "640",
    )
    score = json.loads((work / "ckpt" / "test_summary.json").read_text())["ttt_bpb"]
    assert score == pytest.approx(json.loads((fitted / "summary.json").read_text())["bpb"]["ema"], rel=1e-6)


def test_a_resumed_run_ends_with_the_same_weights(work):
    # A schedule without shares, since the run is cut by another step limit.
    options = [
        "--export.enabled",
        "false",
        "--model.optimizer.warmdown_iters",
        "0",
        "--model.optimizer.warmup_share",
        "0",
        "--model.optimizer.momentum_warmup_share",
        "0",
    ]
    hymba(work, "fit", "whole", *options)
    whole = torch.load(work / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    hymba(work, "fit", "cut", *options, "--trainer.max_steps", "4")
    hymba(work, "fit", "cut", *options, "--ckpt_path", "last")
    resumed = torch.load(work / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    for kind in ("state_dict", "current_model_state"):
        for name, value in whole[kind].items():
            assert torch.equal(value, resumed[kind][name]), (kind, name)


def test_a_finished_run_is_not_overwritten_by_accident(work, fitted):
    before = (fitted / "artifact.hymba").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        hymba(work, "fit", "fitted")
    assert (fitted / "artifact.hymba").read_bytes() == before


def test_an_artifact_over_the_limit_fails_loudly_and_is_kept_for_a_look(work):
    with pytest.raises(ValueError, match="limit"):
        hymba(work, "fit", "large", "--trainer.max_steps", "1", "--export.quantization.limit_bytes", "1000")
    assert (work / "large" / "artifact.hymba").is_file()
    assert (work / "large" / "checkpoints" / "last.ckpt").is_file()


def test_gptq_calibrates_on_training_batches_inside_the_clock(work):
    folder = hymba(
        work,
        "fit",
        "gptq",
        "--export.quantization.scheme",
        "gptq",
        "--export.calibration_batches",
        "3",
        "--export.quantization.keep_float_numel",
        "100",
        "--export.quantization.bits",
        "4",
    )
    artifact, report = inspect_artifact(folder / "artifact.hymba")
    assert artifact.quantization["scheme"] == "gptq"
    assert any(tensor.storage == "int4" for tensor in report.tensors)
    summary = json.loads((folder / "summary.json").read_text())
    plain = hymba(
        work, "fit", "rounded", "--export.quantization.keep_float_numel", "100", "--export.quantization.bits", "4"
    )
    rounded = json.loads((plain / "summary.json").read_text())
    assert summary["bpb"]["ema"] == rounded["bpb"]["ema"]
    assert summary["bpb"]["artifact"] != rounded["bpb"]["artifact"]
    assert summary["bpb"]["artifact"] == pytest.approx(summary["bpb"]["ema"], abs=0.05)
    assert summary["train_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path", "nowhere.hymba"], "nowhere.hymba does not exist"),
        ([], "give --ckpt_path"),
    ],
)
def test_test_without_weights_says_what_is_missing(work, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hymba(work, "test", "none", *options)


def test_a_damaged_artifact_is_refused(work, fitted):
    data = bytearray((fitted / "artifact.hymba").read_bytes())
    data[len(data) // 2] ^= 1
    (work / "damaged.hymba").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.hymba"):
        hymba(work, "test", "none", "--ckpt_path", str(work / "damaged.hymba"))


def test_help_explains_every_field_within_three_seconds():
    # The first time it is made, and kept.
    subprocess.run([sys.executable, "-m", "hymba_lightning", "fit", "--help"], check=True, capture_output=True)
    for args in (["--help"], ["fit", "--help"]):
        start = time.monotonic()
        out = subprocess.run(
            [sys.executable, "-m", "hymba_lightning", *args], capture_output=True, text=True, check=True
        ).stdout
        assert time.monotonic() - start < 3
    for word in (
        "--model.net.window",
        "Keys a token sees",
        "--model.optimizer.matrix_lr",
        "--data.seq_len",
        "--export.quantization.bits",
        "--model.budget_seconds",
        "Training seconds the run may take",
    ):
        assert word in out


@pytest.mark.ddp
def test_two_ranks_fit_export_and_test(work):
    """Two CPU processes, of which Lightning starts the second, then two as torchrun starts them: equal steps, one
    artifact, a test with uneven sequences."""
    run, log = work / "two", work / "two.log"
    config = work / "tiny.yaml"
    command = typed(config, run, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 6 * 2 * 64 * 2
    assert summary["scored_tokens"] == 699
    arguments = ["test", "--config", str(config), "--run_dir", str(run), "--ckpt_path", str(run / "artifact.hymba")]
    assert finish(start_ranks(arguments, log, 2)) == [0, 0], log_of(log.with_name("two.log.0"))
    result = json.loads((run / "test_summary.json").read_text())
    assert result["tokens"] == 699
    assert result["environment"]["world_size"] == 2
