"""configs/best.yaml goes through all stages: fit, export, score-first test-time training, with a small net on a CPU."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import NET, write_data

from hymba_lightning.cli import run
from hymba_lightning.model import HymbaConfig
from hymba_lightning.quantization import load_artifact
from hymba_lightning.training.optim import OptimizerConfig

BEST = Path(__file__).parent.parent / "configs" / "best.yaml"


def test_a_small_net_goes_through_every_stage_of_the_best_recipe(tmp_path):
    write_data(tmp_path / "data")
    small = {key: value for key, value in NET.items() if not key.startswith("bigram")}
    options = [part for name, value in small.items() for part in (f"--model.net.{name}", str(value))]
    common = [
        "--config",
        str(BEST),
        "--run_dir",
        str(tmp_path / "run"),
        *options,
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
        "--trainer.strategy",
        "auto",
        "--model.compile",
        "false",
        "--data.data_dir",
        str(tmp_path / "data"),
        "--data.seq_len",
        "64",
        "--data.ttt_chunk_tokens",
        "256",
        "--model.ttt.train_seq_len",
        "16",
    ]
    steps = [
        "--trainer.max_steps",
        "8",
        "--model.budget_seconds",
        "null",
        "--model.reserve_seconds",
        "0",
        "--export.calibration_batches",
        "2",
    ]
    run(["fit", *common, *steps])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 8
    assert set(summary["bpb"]) == {"raw", "artifact"}
    artifact = load_artifact(tmp_path / "run" / "artifact.hymba")
    assert not any(name.startswith("bigram") for name in artifact.state_dict)
    run(["test", *common, "--ckpt_path", str(tmp_path / "run" / "artifact.hymba")])
    tested = json.loads((tmp_path / "run" / "test_summary.json").read_text())
    assert tested["tokens"] == 699
    assert tested["ttt_bpb"] < tested["bpb_without_adaptation"] + 0.01


def test_it_is_the_seeds_network_but_for_what_it_names():
    values = yaml.safe_load(BEST.read_text())["model"]
    net = HymbaConfig(**values["net"])
    assert net.to_dict().items() - HymbaConfig().to_dict().items() == {
        ("vocab_size", 8192),
        ("bigram_hash", False),
        ("window", 1024),
        ("d_state", 4),
    }
    OptimizerConfig(**values["optimizer"])


@pytest.mark.parametrize("other", ["hymba_32k.yaml", "reference.yaml"])
def test_it_trains_in_the_same_seconds_on_as_many_tokens_a_step(other):
    best, other = (yaml.safe_load((BEST.parent / name).read_text()) for name in ("best.yaml", other))
    assert best["model"]["budget_seconds"] == other["model"]["budget_seconds"]
    assert {key: best["data"][key] for key in ("seq_len", "micro_batch_size")} == {
        key: other["data"][key] for key in ("seq_len", "micro_batch_size")
    }
