"""Studies over seeds and sequence lengths: the statistics, the tables, and that an interrupted study goes on."""

import json
import sys
import threading
import time

import pytest
from fit_process import finish, start, write_config

from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.studies import runs, seeds
from hymba_lightning.studies.context_scaling import run_lengths
from hymba_lightning.studies.runs import made_with, run_once
from hymba_lightning.studies.seeds import run_seeds
from hymba_lightning.studies.significance import better_than

ENVIRONMENT = {"world_size": 8, "device": "X", "torch": "2", "hymba_lightning": "0"}


def test_table_of_seeds(tmp_path, monkeypatch, capsys):
    def fake(command, run_dir, result, arguments, *, beside=()):
        seed = int(run_dir.name.removeprefix("seed-"))
        assert arguments[arguments.index("--seed_everything") + 1] == str(seed)
        assert ("--ckpt_path" in beside) == (command == "test")
        if command == "test":
            assert beside[-1] == str(run_dir / ("checkpoints/last.ckpt" if seed == 3 else "small.hymba"))
            return {"ttt_bpb": 1.1 + seed / 1000}
        return {
            "bpb": {"raw": 1.0, "ema": 1.1, "artifact": 1.2},
            "steps": 7000 + seed,
            "artifact_bytes": 14_000_000,
            "environment": ENVIRONMENT,
            **({} if seed == 3 else {"artifact": "small.hymba"}),
        }

    monkeypatch.setattr(seeds, "run_once", fake)
    table = run_seeds([1, 2, 3], tmp_path, ["--config", "x"], baseline=[1.1866, 1.1881, 1.1873])
    assert (tmp_path / "table.md").read_text() == table
    assert "8 × X" in table
    assert "| 2 | 1.0000 | 1.1000 | 1.2000 | 1.1020 | 7,002 | 14,000,000 |" in table
    assert "| mean ± std | 1.0000 ± 0.0000 | 1.1000 ± 0.0000 | 1.2000 ± 0.0000 | 1.1020 ± 0.0010 | 7,002 |" in table
    expected = better_than([1.101, 1.102, 1.103], [1.1866, 1.1881, 1.1873])
    assert f"one-sided p = {expected.p:.2g}" in table
    assert (tmp_path / "seeds.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="different numbers"):
        run_seeds([1, 1], tmp_path, [])
    with pytest.raises(ValueError, match=r"--baseline and --margin are numbers, got \[nan\]"):
        run_seeds([1, 2], tmp_path, [], baseline=[float("nan")])


@pytest.mark.slow
def test_lengths_are_fitted_once_and_an_interrupted_fit_goes_on(tmp_path, monkeypatch):
    arguments = ["--config", str(write_config(tmp_path))]
    # Forked from a process that has imported everything.
    monkeypatch.setattr(runs, "_run", lambda line, log: finish([start(list(line), log)])[0])
    # As if the run at the second length had been killed after two of its four steps.
    run_once(
        "fit",
        tmp_path / "out" / "seq-64",
        "summary.json",
        [
            *arguments,
            "--data.seq_len",
            "64",
            "--data.micro_batch_size",
            "2",
            "--trainer.max_steps",
            "2",
            "--model.budget_seconds",
            "null",
        ],
    )
    for name in ("summary.json", "fit_arguments.json"):
        (tmp_path / "out" / "seq-64" / name).unlink()
    table = run_lengths([32, 64], 128, 4, tmp_path / "out", arguments)
    points = json.loads((tmp_path / "out" / "context_scaling.json").read_text())
    assert [(point["seq_len"], point["steps"]) for point in points] == [(32, 4), (64, 4)]
    assert "at step 3" in (tmp_path / "out" / "seq-64" / "fit.log").read_text()
    assert f"| val_bpb | {points[0]['bpb']:.4f} | {points[1]['bpb']:.4f} |" in table
    assert (tmp_path / "out" / "context_ms.png").is_file()

    def none(*_):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(runs, "_run", none)
    assert run_lengths([32, 64], 128, 4, tmp_path / "out", arguments) == table


def test_a_failed_run_shows_the_end_of_its_log(tmp_path, monkeypatch):
    def fail(line, log):
        log.write_text("first\n" * 20 + "the reason\n")
        return 3

    monkeypatch.setattr(runs, "_run", fail)
    with pytest.raises(RuntimeError, match=r"ended with code 3:\n(first\n)+the reason"):
        run_once("fit", tmp_path / "x", "summary.json", [])
    with pytest.raises(ValueError, match="no multiple"):
        run_lengths([48], 128, 4, tmp_path, [])


def test_an_ended_run_is_not_taken_for_one_with_other_options(tmp_path, monkeypatch):
    def fit(line, log):
        (tmp_path / "x" / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(runs, "_run", fit)
    options = ["--trainer.max_steps", "5", "--seed_everything", "1"]
    assert run_once("fit", tmp_path / "x", "summary.json", options, beside=["--here", "a"]) == {}
    assert run_once("fit", tmp_path / "x", "summary.json", options, beside=["--here", "b"]) == {}
    with pytest.raises(
        ValueError, match=r"x holds a run with other options \(--trainer.max_steps 5 where --trainer.max_steps 6 is"
    ):
        run_once("fit", tmp_path / "x", "summary.json", ["--trainer.max_steps", "6", "--seed_everything", "1"])


def test_two_studies_in_one_folder_do_not_change_what_a_run_was_made_with(tmp_path, monkeypatch):
    folder = tmp_path / "x"

    def fit(line, log):
        (folder / "fit_arguments.json").write_text('["--of", "another"]')
        (folder / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(runs, "_run", fit)
    with FolderClaim(folder, "hymba fit"), pytest.raises(FolderInUseError):
        run_once("fit", folder, "summary.json", ["--mine", "1"])
    assert made_with(folder, "fit") is None
    run_once("fit", folder, "summary.json", ["--mine", "1"])
    assert made_with(folder, "fit") == ["--mine", "1"]


def test_an_edited_config_makes_another_run(tmp_path, monkeypatch):
    def fit(line, log):
        (tmp_path / "x" / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(runs, "_run", fit)
    config = tmp_path / "a.yaml"
    config.write_text("model: {budget_seconds: 1}\n")
    for options in (["--config", str(config)], [f"--config={config}"], ["--config", "demo.yaml"]):
        assert run_once("fit", tmp_path / "x", "summary.json", options) == {}
        assert run_once("fit", tmp_path / "x", "summary.json", options) == {}
        (tmp_path / "x" / "summary.json").unlink()
    options = ["--config", str(config), "--seed_everything", "1"]
    run_once("fit", tmp_path / "x", "summary.json", options)
    config.write_text("model: {budget_seconds: 2}\n")
    with pytest.raises(ValueError, match=r"other options \(--config .*a\.yaml \(sha256 \w+\) where --config .*sha256"):
        run_once("fit", tmp_path / "x", "summary.json", options)


def test_seeds_scored_on_different_texts_are_no_mean(tmp_path, monkeypatch):
    def fake(command, run_dir, result, arguments, *, beside=()):
        score = {"data": run_dir.name, "tokenizer": "t", "tokens": 9, "bytes": 9}
        return {"bpb": {"raw": 1.0}, "scores": {"raw": score}, "steps": 1, "environment": ENVIRONMENT}

    monkeypatch.setattr(seeds, "run_once", fake)
    with pytest.raises(
        ValueError, match=r"seed-2 was scored on other text than .*seed-1, as when data were prepared anew"
    ):
        run_seeds([1, 2], tmp_path, [], test=False)


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """In place of Python, a program that says when it is there, and saves what it has when it is told to end."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ntrap 'echo saved; exit 143' TERM\necho started\nwhile :; do sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def when_started(log, act):
    """Calls `act` from a thread as soon as the log says that the program is there."""

    def wait():
        while not (log.is_file() and "started" in log.read_text()):
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupted_run_saves_what_it_has(tmp_path, stubborn, ctrl_c):
    log = tmp_path / "x" / "fit.log"
    when_started(log, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run_once("fit", tmp_path / "x", "summary.json", [])
    assert log.read_text() == "started\nsaved\n"
