"""A tiny run that was fitted, exported and tested, made once per test session."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from fit_process import finish, start, write_config


def make_run(folder: Path, steps: int = 8, name: str = "run") -> Path:
    """Config tiny.yaml and data in `folder`; the run is in <folder>/<name>, which is returned."""
    config, run = write_config(folder, ttt={"epochs": 1, "freeze_blocks": 0, "lr": 0.02}), folder / name
    common = ["--config", str(config), "--run_dir", str(run)]
    fit = [
        "fit",
        *common,
        "--export.enabled",
        "true",
        "--trainer.max_steps",
        str(steps),
        "--model.log_every_n_steps",
        "2",
        "--trainer.val_check_interval",
        "4",
    ]
    test = ["test", *common, "--ckpt_path", str(run / "artifact.hymba")]
    for command in (fit, test):
        if finish([start(command, folder / "log")]) != [0]:
            raise RuntimeError((folder / "log").read_text())
    return run


def without_native_loops(run: Path, folder: Path) -> Path:
    """A copy of a run whose packaged code compiles no loop by numba, for which every new folder takes five seconds."""
    copied = Path(shutil.copytree(run, folder))
    config = yaml.safe_load((copied / "test_config.yaml").read_text())
    config["model"]["runtime"] |= {"scan_backend": "chunked", "conv_backend": "torch"}
    (copied / "test_config.yaml").write_text(yaml.safe_dump(config))
    return copied
