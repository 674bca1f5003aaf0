"""Two nodes of one rank each: one run, one score, and the artifact on both disks where they share none."""

import json
import shutil

import injected
import pytest
import torch
from fit_process import finish, log_of, start_nodes, write_config
from tiny import write_data


@pytest.mark.ddp
def test_two_nodes_without_a_shared_disk(tmp_path):
    config = write_config(tmp_path)
    for node in range(2):
        (tmp_path / f"node-{node}").mkdir()
    own = ["--config", str(config), "--run_dir", "run"]
    fit = ["fit", *own, "--export.enabled", "true", "--trainer.max_steps", "4"]
    environment = {"TEST_NODES": str(tmp_path)}
    codes = finish(start_nodes(fit, tmp_path / "fit", 2, injected.own_folder, environment))
    assert codes == [0, 0], [(tmp_path / f"fit.{node}").read_text()[-2000:] for node in range(2)]
    artifacts = [(tmp_path / f"node-{node}" / "run" / "artifact.hymba").read_bytes() for node in range(2)]
    assert artifacts[0] == artifacts[1]
    summary = json.loads((tmp_path / "node-0" / "run" / "summary.json").read_text())
    assert summary["environment"]["world_size"] == 2
    assert summary["tokens"] == 4 * 2 * 2 * 64
    assert not (tmp_path / "node-1" / "run" / "summary.json").exists()
    test = ["test", *own, "--ckpt_path", "run/artifact.hymba"]
    assert finish(start_nodes(test, tmp_path / "test", 2, injected.own_folder, environment)) == [0, 0]
    assert json.loads((tmp_path / "node-0" / "run" / "test_summary.json").read_text())["tokens"] == 699


def _two_disks(folder):
    """A config whose paths are relative, and a folder for each of two nodes."""
    config = write_config(folder)
    for node in range(2):
        (folder / f"node-{node}").mkdir()
    return ["fit", "--config", str(config), "--run_dir", "run", "--trainer.max_steps", "2"]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("n_tokens", "split", "said"),
    [((20_000, 20_100), "train", "data (train): rank 1 on "), ((20_000, None), "train", "no shard matches")],
    ids=["other text", "no shard"],
)
def test_a_node_with_other_data_is_named_before_a_step_is_made(tmp_path, n_tokens, split, said):
    fit = _two_disks(tmp_path)
    for node, count in enumerate(n_tokens):
        data = write_data(tmp_path / f"node-{node}" / "data", n_train=count or 20_000)
        if count is None:
            next(data.glob(f"*_{split}_*")).unlink()
    environment = {"TEST_NODES": str(tmp_path)}
    ranks = start_nodes([*fit, "--data.data_dir", "data"], tmp_path / "fit", 2, injected.own_folder, environment)
    assert finish(ranks, timeout=60) == [2, 2]
    for node in range(2):
        assert "hymba fit" in log_of(tmp_path / f"fit.{node}")
        assert said in log_of(tmp_path / f"fit.{node}")
        assert "Traceback" not in log_of(tmp_path / f"fit.{node}")
    assert not (tmp_path / "node-0" / "run").exists()


@pytest.mark.ddp
def test_a_node_with_an_older_checkpoint_does_not_go_on(tmp_path):
    fit, environment = _two_disks(tmp_path), {"TEST_NODES": str(tmp_path)}
    assert finish(start_nodes(fit, tmp_path / "fit", 2, injected.own_folder, environment)) == [0, 0]
    last = tmp_path / "node-0" / "run" / "checkpoints" / "last.ckpt"
    other = tmp_path / "node-1" / "run" / "checkpoints" / "last.ckpt"
    other.parent.mkdir(parents=True)
    shutil.copy(last, other)
    on = [*fit[:-1], "3", "--ckpt_path", "last"]
    assert finish(start_nodes(on, tmp_path / "on", 2, injected.own_folder, environment)) == [0, 0]
    # Copied to the other disk once, and not again.
    on[-3] = "4"
    again = start_nodes(on, tmp_path / "again", 2, injected.own_folder, environment)
    assert finish(again, timeout=60) == [2, 2]
    assert "--ckpt_path: rank 1 on " in log_of(tmp_path / "again.0")
    assert "died" not in log_of(tmp_path / "again.0"), "a refusal of all is no death of one"
    assert torch.load(last, weights_only=True)["global_step"] == 3
