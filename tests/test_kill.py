"""`hymba fit` killed with SIGKILL at random moments and resumed: the same weights, the budget spent once."""

from __future__ import annotations

import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_process import finish, start, start_ranks, wait_for, write_config

from hymba_lightning.run import RunRecord

STEPS = 30


def load(run: Path) -> dict[str, Any]:
    """The checkpoint of a run, as nothing but tensors and plain values."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimizer, random state and data position are the same bits."""
    a, b = load(one), load(other)
    assert a["global_step"] == b["global_step"] == STEPS
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "HymbaDataModule"):
        assert_equal(a[part], b[part], part)
    randomness = [state["callbacks"]["TrainingCheckpoint"]["random_states"] for state in (a, b)]
    assert_equal(*randomness, "random_states")


def run_killed(
    config: Path, run: Path, n_kills: int, seed: int, world_size: int = 1, options: tuple[str, ...] = ()
) -> list[int]:
    """Starts, kills and resumes a run; returns the steps at which the survivors' checkpoints stood."""
    chance, log, steps = random.Random(seed), run.parent / f"{run.name}.log", []
    last = run / "checkpoints" / "last.ckpt"
    for attempt in range(n_kills + 1):
        arguments = ["fit", "--config", str(config), "--run_dir", str(run), *options]
        before = last.stat().st_mtime_ns if last.is_file() else 0
        if before:
            arguments += ["--ckpt_path", "last"]
        processes = start_ranks(arguments, log, world_size) if world_size > 1 else [start(arguments, log)]
        if attempt == n_kills:
            assert finish(processes) == [0] * world_size, log_text(log, world_size)
            break
        wait_for(partial(_checkpoint_is_newer, last, before, processes))
        # Anywhere in the steps, the writing of checkpoints and between.
        time.sleep(chance.uniform(0.0, 0.25))
        for process in chance.sample(processes, world_size):
            process.kill()
        finish(processes)
        steps.append(load(run)["global_step"])
    return steps


def _checkpoint_is_newer(last: Path, than: int, processes: list) -> bool:
    """Or a process has ended, after which nothing more comes."""
    return (last.is_file() and last.stat().st_mtime_ns > than) or any(p.exitcode is not None for p in processes)


def log_text(log: Path, world_size: int) -> str:
    """What the processes printed."""
    names = [f"{log.name}.{rank}" for rank in range(world_size)] if world_size > 1 else [log.name]
    return "\n".join(log.with_name(name).read_text()[-3000:] for name in names)


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path):
    config = write_config(tmp_path)
    assert finish(
        [start(["fit", "--config", str(config), "--run_dir", str(tmp_path / "whole")], tmp_path / "whole.log")]
    ) == [0], log_text(tmp_path / "whole.log", 1)
    steps = run_killed(config, tmp_path / "cut", 3, seed=time.time_ns())
    assert len({*steps, 0, STEPS}) > 2, f"killed at {steps}: all kills fell on the ends of the run"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # Nothing is left behind by the killed writers.
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.ddp
def test_two_killed_ranks_end_with_the_same_bits(tmp_path):
    config = write_config(tmp_path)
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "whole")]
    assert finish(start_ranks(arguments, tmp_path / "whole.log", 2)) == [0, 0], log_text(tmp_path / "whole.log", 2)
    run_killed(config, tmp_path / "cut", 1, seed=time.time_ns(), world_size=2)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_run_spends_its_budget_once(tmp_path):
    budget = 1.5
    config = write_config(tmp_path, budget_seconds=budget, compile_warmup_steps=1)
    run = tmp_path / "run"
    options = ("--trainer.max_steps", "-1")
    run_killed(config, run, 2, seed=time.time_ns(), options=options)
    clock = load(run)["callbacks"]["WallClock"]
    # A step is predicted from the longest of the recent ones; on a busy machine the last may be longer still.
    longest = max(clock["recent"])
    assert budget - 5 * longest < clock["elapsed"] <= budget + longest
    assert clock["steps"] == load(run)["global_step"]
    # One resume more has nothing left to spend.
    steps = load(run)["global_step"]
    arguments = ["fit", "--config", str(config), "--run_dir", str(run), *options, "--ckpt_path", "last"]
    assert finish([start(arguments, tmp_path / "again.log")]) == [0], log_text(tmp_path / "again.log", 1)
    assert load(run)["global_step"] == steps
    assert "already spent" in (tmp_path / "again.log").read_text()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=[pytest.mark.ddp, pytest.mark.more])])
def test_killed_at_any_moment_of_a_whole_fit_a_run_ends_with_the_same_artifact(tmp_path, world_size):
    """From its first import to its last file; HYMBA_KILLS=30 kills so many runs instead of a few."""
    n_kills, seed = int(os.environ.get("HYMBA_KILLS", 4 - world_size)), time.time_ns()
    config, chance = write_config(tmp_path), random.Random(seed)
    options = ["--export.enabled", "true", "--trainer.max_steps", "8", "--trainer.val_check_interval", "4"]
    options += ["--export.quantization.scheme", "mixed", "--export.quantization.gptq", "true"]
    options += ["--export.quantization.limit_bytes", "500000", "--summary.plots", "true"]

    def begin(run: Path, *more: str) -> list:
        arguments = ["fit", "--config", str(config), "--run_dir", str(run), *options, *more]
        log = tmp_path / f"{run.name}.log"
        return start_ranks(arguments, log, world_size) if world_size > 1 else [start(arguments, log)]

    finish([start(["--version"], tmp_path / "log")])  # what the server of processes takes to start is no run's time
    whole, started = tmp_path / "whole", time.monotonic()
    assert finish(begin(whole)) == [0] * world_size, log_text(tmp_path / "whole.log", world_size)
    seconds = time.monotonic() - started
    found, attempts = [], 0
    while len(found) < n_kills:
        run, moment = tmp_path / f"cut-{attempts}", seconds * (len(found) + chance.random()) / n_kills
        attempts += 1
        processes = begin(run)
        time.sleep(moment)
        if all(process.exitcode == 0 for process in processes):
            seconds *= 0.9  # this one was quicker: nothing was left to kill
            continue
        # All at once, or one that the others have to notice.
        for process in chance.sample(processes, chance.choice([1, world_size])):
            process.kill()
        finish(processes)
        last, ended = run / "checkpoints" / "last.ckpt", (run / "artifact.hymba").is_file()
        step = load(run)["global_step"] if last.is_file() else 0
        found.append(f"{moment:.1f} s: step {step}{', artifact written' if ended else ''}")
        codes = finish(begin(run, *(["--ckpt_path", "last"] if last.is_file() else [])))
        assert codes == [0] * world_size, f"seed {seed}, {found}\n{log_text(tmp_path / f'{run.name}.log', world_size)}"
        assert_same_end(whole, run)
    print(f"{n_kills} kills of {world_size} in a fit of {seconds:.1f} s, seed {seed}:", *found, sep="\n  ")


def assert_same_end(whole: Path, run: Path) -> None:
    """The same artifact, byte for byte, the same scores, and no file more or less."""
    assert (run / "artifact.hymba").read_bytes() == (whole / "artifact.hymba").read_bytes()
    one, other = RunRecord.load(whole), RunRecord.load(run)
    assert other.finished
    assert {name: score.nats for name, score in one.stages().items()} == {
        name: score.nats for name, score in other.stages().items()
    }
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
