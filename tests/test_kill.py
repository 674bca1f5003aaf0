"""`hymba fit` killed with SIGKILL at random moments and resumed: the same weights, the budget spent once."""

from __future__ import annotations

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
    steps = run_killed(config, tmp_path / "cut", 4, seed=time.time_ns())
    assert len({*steps, 0, STEPS}) > 2, f"killed at {steps}: all kills fell on the ends of the run"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # Nothing is left behind by the killed writers.
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.ddp
def test_two_killed_ranks_end_with_the_same_bits(tmp_path):
    config = write_config(tmp_path)
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "whole")]
    assert finish(start_ranks(arguments, tmp_path / "whole.log", 2)) == [0, 0], log_text(tmp_path / "whole.log", 2)
    run_killed(config, tmp_path / "cut", 2, seed=time.time_ns(), world_size=2)
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


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.ddp)])
def test_killed_in_what_comes_after_training_a_run_ends_with_the_same_artifact(tmp_path, world_size):
    config, chance = write_config(tmp_path), random.Random(time.time_ns())
    options = [
        "--export.enabled",
        "true",
        "--export.quantization.scheme",
        "mixed",
        "--export.quantization.gptq",
        "true",
        "--export.quantization.limit_bytes",
        "500000",
        "--trainer.max_steps",
        "5",
    ]

    def begin(run: Path, *more: str) -> list:
        arguments = ["fit", "--config", str(config), "--run_dir", str(run), *options, *more]
        log = tmp_path / f"{run.name}.log"
        return start_ranks(arguments, log, world_size) if world_size > 1 else [start(arguments, log)]

    assert finish(begin(tmp_path / "whole")) == [0] * world_size, log_text(tmp_path / "whole.log", world_size)
    run = tmp_path / "cut"
    log = tmp_path / ("cut.log.0" if world_size > 1 else "cut.log")
    for kill in range(3):
        processes = begin(run, *(["--ckpt_path", "last"] if kill else []))
        told = kill + 1
        wait_for(
            lambda: (
                (log.is_file() and log.read_text().count("scoring raw weights") >= told)  # noqa: B023
                or any(p.exitcode is not None for p in processes)  # noqa: B023
            )
        )
        time.sleep(chance.uniform(0.0, 0.6))
        for process in processes:
            process.kill()
        finish(processes)
    if not (run / "record.json").is_file() or not RunRecord.load(run).finished:
        codes = finish(begin(run, "--ckpt_path", "last"))
        assert codes == [0] * world_size, log_text(tmp_path / "cut.log", world_size)
    assert (run / "artifact.hymba").read_bytes() == (tmp_path / "whole" / "artifact.hymba").read_bytes()
    one, other = RunRecord.load(tmp_path / "whole"), RunRecord.load(run)
    assert other.finished
    assert {name: score.nats for name, score in one.stages().items()} == {
        name: score.nats for name, score in other.stages().items()
    }
    left = {path.name for path in run.iterdir()} - {".lock", ".owner.json"}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()} - {".lock", ".owner.json"}
