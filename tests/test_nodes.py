"""Two nodes of one rank each: one run, one score, and the artifact on both disks where they share none."""

import json

import injected
import pytest
from fit_process import finish, start_nodes, write_config


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
