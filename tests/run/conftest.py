"""Shared by the tests of runs: tiny data with a config, and a run of it."""

from __future__ import annotations

import pytest
import yaml
from tiny import NET, write_data
from tiny_runs import hymba


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def fitted(work):
    return hymba(work, "fit", "fitted")
