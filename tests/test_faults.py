"""Faults injected into real runs of `hymba fit`: what is lost, who is named, and that nobody waits for the dead."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import injected
import pytest
import torch
import yaml
from fit_process import finish, start, start_ranks, typed, wait_for, write_config

from hymba_lightning import command_line, signals
from hymba_lightning.quantization import load_artifact


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def fit(config: Path, run: Path, *options: str, hook: object = None) -> tuple[int | None, str]:
    """Runs `hymba fit` in a process of its own; its exit code and everything it printed."""
    log = run.parent / f"{run.name}.log"
    process = start(["fit", "--config", str(config), "--run_dir", str(run), *options], log, hook=hook)
    return finish([process])[0], log.read_text()


def edit(config: Path, **sections: dict) -> Path:
    """A copy of a config with fields of its sections changed."""
    values = yaml.safe_load(config.read_text())
    for section, fields in sections.items():
        values[section].update(fields)
    path = config.with_name("edited.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


# A rank dies ------------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_the_other_which_says_who_died(tmp_path, config, dead):
    log, run = tmp_path / "log", tmp_path / "run"
    ranks = start_ranks(
        ["fit", "--config", str(config), "--run_dir", str(run), "--trainer.max_steps", "1000"],
        log,
        2,
        hook=injected.slow_steps,
    )
    wait_for((run / "checkpoints" / "last.ckpt").is_file)
    ranks[dead].kill()
    started = time.monotonic()
    codes = finish(ranks, timeout=60)
    assert codes[1 - dead] not in (0, None)
    assert time.monotonic() - started < 60
    printed = (tmp_path / f"log.{1 - dead}").read_text()
    assert f"rank {dead} of 2 died (its process ended without a word" in printed
    assert "fault of the program" not in printed, "the collective's error only follows"


@pytest.mark.ddp
def test_a_rank_that_hangs_is_ended_when_the_other_is_gone(tmp_path, config):
    """As a collective on a GPU would, which notices no dead peer."""
    ranks = start_ranks(
        ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")],
        tmp_path / "log",
        2,
        hook=injected.rank_1_hangs,
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait_for(lambda: last.is_file() and torch.load(last, weights_only=True)["global_step"] == 4)
    ranks[0].kill()
    assert finish(ranks, timeout=30) == [-9, 1]
    assert "rank 0 of 2 died" in (tmp_path / "log.1").read_text()


@pytest.mark.ddp
def test_a_rank_that_fails_tells_the_others_why(tmp_path, config):
    ranks = start_ranks(
        ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")],
        tmp_path / "log",
        2,
        hook=injected.error_on_rank_1,
    )
    codes = finish(ranks, timeout=60)
    assert None not in codes
    assert 0 not in codes
    assert "rank 1 of 2 died (ValueError: the cooling failed)" in (tmp_path / "log.0").read_text()
    assert "rank 0 of 2 died" not in (tmp_path / "log.1").read_text()


@pytest.mark.ddp
def test_a_rank_that_is_stopped_is_named_and_the_others_end(tmp_path, config):
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(arguments, tmp_path / "log", 2, hook=injected.rank_1_stands_still)
    assert finish(ranks[:1], timeout=60) == [1]
    ranks[1].kill()
    assert "rank 1 of 2 died (its process has stood still for 5 s" in (tmp_path / "log.0").read_text()


@pytest.mark.ddp
def test_a_rank_killed_before_data_are_open_is_named(tmp_path, config):
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(arguments, tmp_path / "log", 2, hook=injected.rank_1_is_killed_opening_data)
    assert finish(ranks, timeout=60) == [1, -9]
    assert "rank 1 of 2 died (its process ended without a word" in (tmp_path / "log.0").read_text()


@pytest.mark.ddp
def test_a_signal_to_one_rank_before_training_ends_all_by_it(tmp_path, config):
    arguments = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    arguments += ["--model.compile_warmup_steps", "1"]
    ranks = start_ranks(arguments, tmp_path / "log", 2, hook=injected.rank_1_gets_a_signal_in_the_warmup)
    assert finish(ranks, timeout=60) == [143, 143]
    printed = (tmp_path / "log.0").read_text()
    assert "rank 1 of 2 died (stopped by SIGTERM)" in printed
    assert "Traceback" not in printed


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.more), 1])
def test_a_killed_rank_ends_a_run_that_lightning_launched(tmp_path, config, dead):
    """The command as a user types it: Lightning starts rank 1 itself."""
    run, log = tmp_path / "run", open(tmp_path / "log", "w")  # noqa: SIM115
    command = typed(config, run, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000")
    with subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as main:
        wait_for((run / "checkpoints" / "last.ckpt").is_file, timeout=120)
        child = int(
            subprocess.run(
                ["pgrep", "-P", str(main.pid), "-f", "hymba_lightning"], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
        os.kill(main.pid if dead == 0 else child, 9)
        wait_for(lambda: not _alive(child) and main.poll() is not None, timeout=60)
    assert f"rank {dead} of 2 died" in (tmp_path / "log").read_text()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.more
def test_a_stopped_rank_that_lightning_launched_is_ended_too(tmp_path, config):
    run, log = tmp_path / "run", open(tmp_path / "log", "w")  # noqa: SIM115
    code = "import injected; injected.rank_1_stands_still(0); from hymba_lightning.__main__ import main; main()"
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000"]
    script = tmp_path / "fit.py"
    script.write_text(code)
    command = [sys.executable, str(script), *typed(config, run, *options)[3:]]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as main:
        wait_for((run / "checkpoints" / "last.ckpt").is_file, timeout=120)
        child = int(
            subprocess.run(["pgrep", "-P", str(main.pid)], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        os.kill(child, signal.SIGSTOP)
        wait_for(lambda: not _alive(child) and main.poll() is not None, timeout=60)
    assert "rank 1 of 2 died (its process has stood still" in (tmp_path / "log").read_text()


def test_a_rank_ends_soon_after_the_process_that_started_it(tmp_path):
    """Killed before the ranks have met, rank 0 leaves nothing that the others could notice."""
    code = "import time; from hymba_lightning import signals; signals.end_with_parent('hymba fit', 0.2); "
    code += "print('ready', flush=True); time.sleep(60)"
    out = tmp_path / "out"
    with open(out, "w") as file:
        shell = subprocess.Popen(
            ["sh", "-c", f'"{sys.executable}" -c "{code}" & echo $!; wait'], stdout=file, stderr=file
        )
        wait_for(lambda: "ready" in out.read_text())
        shell.kill()
        shell.wait()
    child = int(out.read_text().split()[0])
    wait_for(lambda: not _alive(child), timeout=10)
    assert "the process that started this rank is gone" in out.read_text()


def test_a_rank_ends_whose_starter_was_gone_before_it_could_look():
    """Importing what a rank needs takes seconds, in which the one that started it may be killed."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    code = "import time; from hymba_lightning import signals; signals.listen('hymba fit'); "
    code += "signals.end_with_parent('hymba fit', 0.1); time.sleep(60)"
    environment = os.environ | {"LOCAL_RANK": "1", signals.STARTER: str(gone.pid)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert "the process that started this rank is gone" in done.stderr


@pytest.mark.parametrize("starter", ["a rank", "a shell"])
def test_only_ranks_that_another_one_started_end_with_their_parent(starter):
    code = "from hymba_lightning import signals; signals.listen('hymba fit'); print(signals.launched_by_lightning())"
    start = (
        f"import os, subprocess, sys; os.environ['LOCAL_RANK'] = '1'; subprocess.run([sys.executable, '-c', {code!r}])"
    )
    first = "from hymba_lightning import signals; signals.listen('hymba fit'); " if starter == "a rank" else ""
    environment = {name: value for name, value in os.environ.items() if name != signals.STARTER}
    done = subprocess.run(
        [sys.executable, "-c", first + start], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(starter == "a rank")


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# NaN --------------------------------------------------------------------------------------------------------------


def test_a_nan_stops_with_step_shard_offset_and_the_checkpoint_from_before(tmp_path, config):
    code, printed = fit(edit(config, data={"shuffle_seed": None}), tmp_path / "run", hook=injected.nan_on_the_last_rank)
    assert code == 2
    # In order, the spans of step 8 begin at 65 tokens times 14 and 15.
    shard = tmp_path / "data" / "tiny_train_000000.bin"
    assert (
        f"the loss of step 8 is not finite (NaN or infinite); its batch: {shard} from token 910, {shard} from "
        "token 975" in printed
    )
    assert "last.ckpt is from before" in printed
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    code, printed = fit(
        config, tmp_path / "run", "--ckpt_path", "last", "--model.on_nan", "skip", hook=injected.nan_on_the_last_rank
    )
    assert code == 0, printed
    assert "step 8 is not finite" in printed
    assert "Its gradient was left out" in printed


@pytest.mark.ddp
def test_a_nan_on_one_rank_stops_all_at_one_step_with_the_ranks_batch(tmp_path, config):
    ranks = start_ranks(
        ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")],
        tmp_path / "log",
        2,
        hook=injected.nan_on_the_last_rank,
    )
    assert finish(ranks) == [2, 2]
    printed = (tmp_path / "log.0").read_text()  # the first rank speaks for all
    assert "the loss of step 8 is not finite" in printed
    assert "(rank 1)" in printed
    assert "(rank 0)" not in printed
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7


# Disks and files --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_checkpoint_and_artifact_whole(tmp_path, config):
    run = tmp_path / "run"
    exporting = edit(config, export={"enabled": True, "score_stages": False}, trainer={"max_steps": 3})
    assert fit(exporting, run)[0] == 0
    kept = {path: path.read_bytes() for path in (run / "artifact.hymba", run / "checkpoints" / "last.ckpt")}
    on = ("--ckpt_path", "last")
    code, printed = fit(exporting, run, *on, "--trainer.max_steps", "5", hook=injected.full_disk)
    assert code == 2
    assert "checkpoint " in printed
    assert "not written" in printed
    # Without a checkpoint to write, the export is what meets the full disk.
    code, printed = fit(exporting, run, *on, "--export.quantization.bits", "7", hook=injected.full_disk)
    assert code == 2
    assert "artifact.hymba" in printed
    assert {path: path.read_bytes() for path in kept} == kept
    load_artifact(run / "artifact.hymba")
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (injected.shard_vanishes, "was there when the run began and cannot be read now"),
        (injected.shard_shrinks, "shrank from"),
    ],
    ids=["vanishes", "shrinks"],
)
def test_a_shard_lost_in_mid_run_is_named(tmp_path, config, hook, message):
    code, printed = fit(config, tmp_path / "run", hook=hook)
    assert code == 2
    assert str(tmp_path / "data" / "tiny_train_000000.bin") in printed
    assert message in printed


class _Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "sample", "import-reference"])
def test_a_checkpoint_cannot_execute_code(tmp_path, config, command, monkeypatch):
    target, path = tmp_path / "executed", tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": _Hostile(target)}, path)
    arguments = {"sample": ["--ckpt_path", str(path)], "import-reference": [str(path), str(tmp_path / "out.hymba")]}
    common = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--ckpt_path", str(path)]
    # A variable that makes torch.load unsafe must change nothing.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("HYMBA_RUN_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["hymba", command, *arguments.get(command, common)])
    # For the rest of the process, which is that of other tests.
    monkeypatch.setattr(signals, "listen", lambda command: None)
    with pytest.raises((pickle.UnpicklingError, ValueError, SystemExit)):
        command_line.main()
    assert not target.exists()


# Configs that cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("model", {"net": {"n_heads": 3}}, "is not a multiple of n_heads=3: change either"),
        ("model", {"net": {"window": 0}}, "window must be at least 1"),
        ("model", {"net": {"vocab_size": 1000}}, "set it to 1024"),
        ("data", {"seq_len": 30_000}, "lower data.seq_len or prepare more text"),
        ("model", {"on_nan": "ignore"}, "choose from stop, skip"),
    ],
)
def test_a_config_that_cannot_be_fails_before_any_work(tmp_path, config, section, fields, message, monkeypatch, capsys):
    from hymba_lightning.cli import run

    monkeypatch.setattr(sys, "argv", ["hymba"])
    values = yaml.safe_load(config.read_text())
    for name, value in fields.items():
        values[section][name] = values[section].get(name, {}) | value if isinstance(value, dict) else value
    config.write_text(yaml.safe_dump(values))
    monkeypatch.delenv("HYMBA_RUN_DIR", raising=False)
    with pytest.raises((ValueError, SystemExit)) as failure:
        run(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")])
    assert message in str(failure.value) + capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
