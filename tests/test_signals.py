"""SIGINT, SIGTERM and SIGHUP end every command, wherever it is, with 128 + signal and one line on what to do next."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import injected
import pytest
import torch
from fit_process import finish, log_of, start, start_ranks, typed, wait_for, write_config

PHASES = {"setup": injected.waits_in_setup, "warm-up": injected.waits_in_warmup, "finish": injected.waits_in_the_finish}


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, compile_warmup_steps=1)


def waits(log: Path) -> bool:
    """Whether the process has come to where it is to be interrupted."""
    return log.is_file() and "waiting here" in log_of(log)


def last_line(log: Path) -> str:
    """What was printed last."""
    return log_of(log).strip().splitlines()[-1]


@pytest.mark.parametrize("phase", PHASES)
def test_outside_the_training_loop_a_signal_ends_fit_at_once(tmp_path, config, phase):
    log = tmp_path / "log"
    process = start(
        ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "2"],
        log,
        hook=PHASES[phase],
    )
    wait_for(lambda: waits(log))
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], timeout=20) == [128 + signal.SIGTERM], log_of(log)
    assert "Traceback" not in log_of(log)
    assert last_line(log).startswith("hymba fit: stopped by SIGTERM")
    if phase == "finish":
        assert "last.ckpt holds step 2" in last_line(log)
    else:
        assert "before anything was saved" in last_line(log)


@pytest.mark.parametrize("phase", ["setup", "warm-up"])
def test_a_run_that_was_to_go_on_still_has_what_it_goes_on_from(tmp_path, config, phase):
    log, run = tmp_path / "log", tmp_path / "run"
    fit = ["fit", "--config", str(config), "--run_dir", str(run)]
    assert finish([start([*fit, "--trainer.max_steps", "2"], log)]) == [0], log_of(log)
    process = start([*fit, "--ckpt_path", "last", "--trainer.max_steps", "4"], log, hook=PHASES[phase])
    wait_for(lambda: waits(log))
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], timeout=20) == [143], log_of(log)
    assert "anything was saved" not in last_line(log)
    assert "is as it was" in last_line(log) if phase == "setup" else "last.ckpt holds step 2" in last_line(log)
    command = shlex.split(last_line(log).partition("o go on: ")[2])
    assert finish([start(command[1:], log)]) == [0], log_of(log)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_the_last_line_is_the_command_that_goes_on(tmp_path, config, signum):
    log, run = tmp_path / "log", tmp_path / "a run"
    process = start(
        ["fit", "--config", str(config), f"--run_dir={run}", "--overwrite", "true"], log, hook=injected.slow_steps
    )
    wait_for((run / "checkpoints" / "last.ckpt").is_file)
    os.kill(process.pid, signum)
    assert finish([process], timeout=20) == [128 + signum], log_of(log)
    reached = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < 30
    assert f"holds step {reached}" in last_line(log)
    command = shlex.split(last_line(log).partition("To go on: ")[2])
    assert command[0] == "hymba"
    assert "--overwrite" not in command
    assert finish([start(command[1:], log)]) == [0], log_of(log)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 30


def test_a_validation_is_not_waited_for(tmp_path, config):
    log, run = tmp_path / "log", tmp_path / "run"
    process = start(
        [
            "fit",
            "--config",
            str(config),
            "--run_dir",
            str(run),
            "--trainer.val_check_interval",
            "3",
            "--checkpoint.every_n_steps",
            "1000",
            "--data.val_micro_batch_size",
            "1",
        ],
        log,
        hook=injected.slow_validation,
    )
    wait_for(lambda: waits(log))
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], timeout=20) == [128 + signal.SIGTERM], log_of(log)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert log_of(log).count("waiting here") < 4


@pytest.mark.ddp
@pytest.mark.parametrize("hook", [injected.slow_steps, injected.slow_validation])
def test_a_signal_to_one_rank_ends_both_with_its_number(tmp_path, config, hook):
    log, run = tmp_path / "log", tmp_path / "run"
    options = ["--trainer.val_check_interval", "3"] if hook is injected.slow_validation else []
    ranks = start_ranks(["fit", "--config", str(config), "--run_dir", str(run), *options], log, 2, hook=hook)
    ready = (lambda: waits(tmp_path / "log.0")) if options else (run / "checkpoints" / "last.ckpt").is_file
    wait_for(ready)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert finish(ranks, timeout=30) == [143, 143], log_of(tmp_path / "log.0") + log_of(tmp_path / "log.1")
    assert "stopped by SIGTERM" in last_line(tmp_path / "log.0")
    assert "stopped by" not in log_of(tmp_path / "log.1"), "rank 0 alone speaks"
    assert "backend numba" in log_of(tmp_path / "log.0")
    assert "backend numba" not in log_of(tmp_path / "log.1")


def test_an_interrupted_test_fails_so_that_nothing_follows(tmp_path, config):
    log, run = tmp_path / "log", tmp_path / "run"
    common = ["--config", str(config), "--run_dir", str(run)]
    assert finish([start(["fit", *common, "--trainer.max_steps", "2"], log)]) == [0], log_of(log)
    process = start(["test", *common, "--ckpt_path", "last"], log, hook=injected.waits_in_the_test)
    wait_for(lambda: waits(log))
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], timeout=20) == [143]
    assert last_line(log).startswith("hymba test: stopped by SIGTERM before it was done")
    assert not (run / "test_summary.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_prepare_is_ended_by_every_signal(tmp_path, signum):
    (tmp_path / "texts").mkdir()
    for number in range(400):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the text number {number} " * 30, encoding="utf-8")
    process = start(
        ["prepare", str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--vocab_size", "300"],
        tmp_path / "log",
        hook=injected.prepare_saves_often,
    )
    wait_for((tmp_path / "out").is_dir)
    os.kill(process.pid, signum)
    assert finish([process], timeout=30) == [128 + signum]
    assert "stopped by" in last_line(tmp_path / "log")


def test_a_second_signal_ends_at_once_what_does_not_come_back(tmp_path):
    """Also where the main thread is in a call that never returns to Python."""
    code = (
        "import ctypes, signal\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "signals.divert(lambda signum: None)\n"
        "print('ready', flush=True)\n"
        "for _ in range(100):\n"
        "    ctypes.CDLL(None).sleep(5)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.4)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=4) == 130
        assert b"hymba fit: ended at once by a second SIGINT" in process.stderr.read()


def test_signals_that_a_process_was_started_to_ignore_stay_ignored():
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_a_pools_workers_are_ended_by_signals_as_usual():
    """multiprocessing ends its workers by SIGTERM; they must not take it for an order to this command."""
    code = (
        "import multiprocessing, time\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba prepare')\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "worker.start()\n"
        "time.sleep(0.3)\n"
        "worker.terminate()\n"
        "worker.join(10)\n"
        "print(worker.exitcode, signals.pending())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "-15 0\n", done.stderr


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("hook_point", ["training", pytest.param("before", marks=pytest.mark.more)])
def test_a_signal_to_the_command_ends_the_ranks_that_lightning_started(tmp_path, config, hook_point):
    run, log = tmp_path / "run", tmp_path / "log"
    command = typed(config, run, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000")
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as main:
        marker = (
            (run / "checkpoints" / "last.ckpt").is_file
            if hook_point == "training"
            else (lambda: "backend" in log_of(log))
        )
        wait_for(marker, timeout=120)
        main.send_signal(signal.SIGTERM)
        assert main.wait(timeout=60) == 143, log_of(log)
    wait_for(
        lambda: subprocess.run(["pgrep", "-s", str(main.pid)], capture_output=True, check=False).returncode == 1,
        timeout=20,
    )
    assert log_of(log).count("hymba fit: stopped by SIGTERM") == 1
    assert "Traceback" not in log_of(log)


def run_code(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A new interpreter's program."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, **options
    )


def test_a_signal_that_comes_in_an_objects_finalizer_is_not_lost():
    """Python only prints what is raised there; every import has such moments."""
    code = (
        "import os, signal, sys, time\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "class Object:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0)\n"
        "try:\n"
        "    del (lambda kept: kept)(Object()).missing\n"
        "except AttributeError:\n"
        "    pass\n"
        "time.sleep(20)\n"
        "print('went on')\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_a_signal_whose_exception_somebody_caught_ends_training_after_a_step():
    code = (
        "import os, signal\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except BaseException:\n"
        "    pass\n"
        "signals.divert(print)\n"
    )
    assert run_code(code).stdout == "15\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_command_is_understood_ends_it_in_one_line(signum):
    code = (
        "import os, sys\n"
        "from hymba_lightning import __main__\n"
        "class Slow:\n"
        f"    main = staticmethod(lambda: os.kill(os.getpid(), {signum:d}))\n"
        "sys.modules['hymba_lightning.command_line'] = Slow\n"
        "__main__.main()\n"
        "print('went on')\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout) == (128 + signum, "")
    assert done.stderr == f"hymba: stopped by {signum.name} before it began\n"


def test_a_signal_after_the_last_words_ends_in_one_line_what_libraries_do_at_exit():
    code = (
        "import atexit, os, signal, time\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(20))\n"
        "signals.all_is_said('hymba fit')\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stderr) == (143, "hymba fit: ended by SIGTERM after its work was done\n")


def test_a_signal_that_finds_only_pythons_own_end_changes_nothing():
    code = (
        "import os, signal, sys\n"
        "from hymba_lightning import signals\n"
        "signals.listen('hymba fit')\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        "        kill(pid, 15)\n"
        "sys.kept = Last()\n"
        "signals.all_is_said('hymba fit')\n"
        "print('done')\n"
        "sys.exit(3)\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")
