"""Two fits into one folder at once: one is refused, and the run that is there is whole, bit for bit.

HYMBA_RACES sets how many pairs are tried.
"""

import os
import random
import time

import pytest
from fit_process import finish, log_of, start, write_config

from hymba_lightning.checkpoints import read_checkpoint
from hymba_lightning.quantization import load_artifact

RACES = int(os.environ.get("HYMBA_RACES", "2"))
OPTIONS = ["--export.enabled", "true", "--trainer.max_steps", "12"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run's folder, by its seed; and how long one takes."""
    folder = tmp_path_factory.mktemp("whole")
    made = {"config": write_config(folder)}
    for seed in ("0", "1"):
        started = time.monotonic()
        run = folder / seed
        arguments = ["fit", "--config", str(made["config"]), "--seed_everything", seed, "--run_dir", str(run), *OPTIONS]
        assert finish([start(arguments, folder / "log")]) == [0], log_of(folder / "log")
        made[seed], made["seconds"] = run, time.monotonic() - started
    return made


def weights(run):
    return {
        name: tensor.tolist()
        for name, tensor in read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("race", range(RACES))
def test_of_two_fits_at_once_one_is_refused_and_the_run_is_whole(whole, tmp_path, race):
    chance = random.Random(race)
    run, seeds = tmp_path / "run", ["0", chance.choice(["0", "1"])]
    overwrite = ["--overwrite", "true"] if race % 2 else []
    processes = []
    for number, seed in enumerate(seeds):
        arguments = ["fit", "--config", str(whole["config"]), "--seed_everything", seed, "--run_dir", str(run)]
        processes.append(start([*arguments, *OPTIONS, *overwrite], tmp_path / f"log{number}"))
        if number == 0:
            time.sleep(chance.uniform(0, 1.2 * whole["seconds"]))
    codes = finish(processes)
    logs = [log_of(tmp_path / f"log{number}") for number in (0, 1)]
    assert 0 in codes, logs
    for code, log in zip(codes, logs, strict=True):
        if code:
            assert code == 2
            assert "Traceback" not in log
            assert "is in use by hymba fit (process" in log or "holds a run" in log
    made_by = seeds[1] if codes[1] == 0 else seeds[0]
    assert weights(run) == weights(whole[made_by])
    assert (run / "artifact.hymba").read_bytes() == (whole[made_by] / "artifact.hymba").read_bytes()
    load_artifact(run / "artifact.hymba")
    left = {path.relative_to(run) for path in run.rglob("*")} - {
        path.relative_to(whole[made_by]) for path in whole[made_by].rglob("*")
    }
    assert not left
