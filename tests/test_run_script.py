"""scripts/run_8gpu, with a `hymba` that only writes down how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "run_8gpu"


@pytest.mark.parametrize(("named", "run"), [(["runs/mine"], "runs/mine"), ([], "runs/hymba_32k")])
def test_options_of_the_fit_hold_for_its_score(tmp_path, named, run):
    fake = tmp_path / "hymba"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [SCRIPT, "data", *named, "--trainer.devices", "4"]
    fit, test = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert fit.endswith(f"--data.data_dir data --run_dir {run} --trainer.devices 4")
    assert test == f"test --config {run}/config.yaml --run_dir {run} --ckpt_path {run}/artifact.hymba"
