"""The reference beside ours: reading its log, stopping it after its last step, saying what went wrong."""

import textwrap
import time

import pytest

from hymba_lightning.studies import reference_step
from hymba_lightning.studies.reference_step import Pair, link_shards, main, run_reference, steady_step_ms, table

# Prints what the reference prints, then works on for long; 7 ms a step after a slow start.
STAND_IN = """
import glob, os, time
assert glob.glob(os.environ["DATA_PATH"] + "/fineweb_train_*.bin") and os.environ["TRAIN_SEQ_LEN"] == "64"
n = int(os.environ["ITERATIONS"])
for step in (1, 20, 40, n):
    print(f"step:{step}/{n} train_loss:1.0 train_time:{500 + 7 * step}ms step_avg:9.0ms")
time.sleep(60)
"""


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"books_{split}_000000.bin").write_bytes(b"x")
    return folder


def script(tmp_path, text):
    path = tmp_path / "train_gpt.py"
    path.write_text(textwrap.dedent(text))
    return path


def run(path, shards, tmp_path, **arguments):
    return run_reference(
        path, shards, shards / "tokenizer.model", tmp_path / "log", seq_len=64, tokens=64, steps=60, **arguments
    )


def test_the_step_time_leaves_the_first_steps_out(tmp_path, shards):
    started = time.monotonic()
    assert run(script(tmp_path, STAND_IN), shards, tmp_path) == pytest.approx(7.0)
    assert time.monotonic() - started < 30, "the script was waited for after its last step"


def test_a_script_that_fails_is_shown(tmp_path, shards):
    with pytest.raises(RuntimeError, match="no module named mamba"):
        run(script(tmp_path, "raise SystemExit('no module named mamba')"), shards, tmp_path)


def test_a_script_that_never_gets_there_is_stopped(tmp_path, shards):
    with pytest.raises(RuntimeError, match="did not reach step 60"):
        run(script(tmp_path, "import time; time.sleep(60)"), shards, tmp_path, timeout=1.0)


def test_a_log_without_steps_is_refused():
    with pytest.raises(ValueError, match="no two lines"):
        steady_step_ms("step:3/9 train_loss:1 train_time:30ms")


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="hymba prepare"):
        link_shards(tmp_path, tmp_path)


def test_table_has_the_ratio():
    assert "**0.500** (0.400–0.600)" in table([Pair(100.0, 40.0), Pair(100.0, 60.0), Pair(80.0, 40.0)])


def test_both_take_turns_and_are_compared(tmp_path, shards, monkeypatch, capsys):
    """The command, with the script's stand-in and without our own fit."""
    monkeypatch.setattr(reference_step, "run_ours", lambda *_, config, **__: 3.5 if config == "hymba_32k.yaml" else 0.0)
    path = script(tmp_path, STAND_IN)
    options = ["--seq_len", "64", "--tokens", "64", "--steps", "60", "--repeats", "2"]
    main(["--train_gpt", str(path), "--data_dir", str(shards), "--out", str(tmp_path / "out"), *options])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "| median | 7.0 | 3.5 | **0.500** (0.500–0.500) |"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["reference-0.json", "reference-0.log", "reference-1.json", "reference-1.log"]


def test_a_run_of_the_reference_that_ended_is_not_made_again(tmp_path, shards, monkeypatch, capsys):
    monkeypatch.setattr(reference_step, "run_ours", lambda *_, **__: 3.5)
    path, out = script(tmp_path, STAND_IN), tmp_path / "out"
    options = [
        "--train_gpt",
        str(path),
        "--data_dir",
        str(shards),
        "--out",
        str(out),
        "--seq_len",
        "64",
        "--tokens",
        "64",
    ]
    main([*options, "--steps", "60", "--repeats", "1"])
    made = []

    def run_again(script, data_dir, tokenizer, log, **_):
        made.append(log.name)
        log.write_text("")
        return 7.0

    monkeypatch.setattr(reference_step, "run_reference", run_again)
    main([*options, "--steps", "60", "--repeats", "2"])
    assert made == ["reference-1.log"]
    assert "run 2: reference 7.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"reference-0\.json is of another script, data, size or GPU"):
        main([*options, "--steps", "80", "--repeats", "1"])
    monkeypatch.setattr(reference_step, "device_name", lambda: "a faster one")
    with pytest.raises(ValueError, match=r"reference-0\.json is of another script, data, size or GPU"):
        main([*options, "--steps", "60", "--repeats", "1"])
