"""Output that breaks (the reader goes away, the disk is full, it is closed): training goes on, filters end quietly."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fit_process import write_config

from hymba_lightning import command_line, streams, studies

HYMBA = [sys.executable, "-m", "hymba_lightning"]
FULL_DISK = b"No space left on device; free some space there, or write to another disk\n"


@pytest.fixture
def fit(tmp_path):
    """The command line of a tiny fit with an artifact, which prints a line at every step."""
    config = write_config(tmp_path)
    return [
        *HYMBA,
        "fit",
        "--config",
        str(config),
        "--run_dir",
        str(tmp_path / "run"),
        "--trainer.max_steps",
        "4",
        "--export.enabled",
        "true",
        "--progress.plain_seconds",
        "0.001",
    ]


def assert_finished(run: Path) -> None:
    """A run ended as it would have with its output read."""
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 4
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "artifact.hymba").is_file()


@pytest.mark.more
def test_training_goes_on_when_nobody_reads_it(tmp_path, fit):
    with subprocess.Popen(fit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=200) == 0
    assert_finished(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.more
def test_training_goes_on_when_the_disk_of_its_log_is_full(tmp_path, fit):
    with open("/dev/full", "wb") as full:
        assert subprocess.run(fit, stdout=full, stderr=full, check=False, timeout=200).returncode == 0
    assert_finished(tmp_path / "run")


@pytest.mark.more
def test_training_goes_on_without_any_stream(tmp_path, fit):
    """Files that are opened later must not take the streams' places."""
    code = subprocess.run(["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *fit], check=False, timeout=200).returncode
    assert code == 0
    assert_finished(tmp_path / "run")


def test_a_file_that_is_opened_later_does_not_take_a_closed_streams_place(tmp_path):
    """Or what a library prints would stand in a checkpoint."""
    code = (
        "import os, sys\nfrom hymba_lightning import streams\nstreams.guard()\n"
        "file = open(sys.argv[1], 'wb')\nos.write(1, b'a line of a library')\nos.write(2, b'another')\n"
        "raise SystemExit(file.fileno())"
    )
    file = tmp_path / "last.ckpt"
    closed = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(file)]
    assert subprocess.run(closed, check=False, timeout=60).returncode > 2
    assert file.read_bytes() == b""


def test_a_filter_ends_quietly_when_its_reader_is_gone(fitted_run):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*HYMBA, "inspect", str(fitted_run / "artifact.hymba")],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 128 + 13
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_filter_whose_output_cannot_be_written_fails_with_one_line(fitted_run):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*HYMBA, "inspect", str(fitted_run / "artifact.hymba")],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr == b"hymba inspect: standard output: " + FULL_DISK


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "typed",
    ["prepare --help", pytest.param("fit --config demo.yaml --print_config", marks=pytest.mark.more), "study"],
)
def test_help_that_cannot_be_written_fails_with_one_line(typed):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*HYMBA, *typed.split()], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines(True)[-1]) == (
        2,
        f"hymba {typed.split()[0]}: standard output: ".encode() + FULL_DISK,
    )


@pytest.mark.parametrize(("lost", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 0)])
def test_a_studys_table_that_was_lost_is_told_at_its_end(monkeypatch, capsys, lost, code):
    done = []

    def study(_):
        print("a table")
        sys.stdout.flush()
        done.append(True)

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(lost, os.strerror(lost))

    monkeypatch.setattr(studies, "run", study)
    monkeypatch.setattr(sys, "stdout", streams.GuardedStream(Full()))
    assert command_line._run_guarded(["study", "ops"], "study", "hymba study", 0.0, debug=False) == code
    assert done
    assert ("standard output: No space" in capsys.readouterr().err) == (code == 2)


def test_a_c_locale_can_print_all_there_is():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([*HYMBA, "--help"], env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "text → tokenizer" in done.stdout.decode()
