"""The time before a fit's first counted step: read from its summary, with caches of its own."""

import json
import os

import pytest
from tiny import NET, write_data

from hymba_lightning.studies import start_time
from hymba_lightning.studies.runs import RunFailedError
from hymba_lightning.studies.start_time import CACHES, caches_in, main, start_of, table


def summary(**phases):
    return {"phases": phases, "wall_clock_seconds": sum(phases.values())}


def test_every_second_of_the_process_is_counted_once():
    start = start_of("cold", 31.0, summary(start=9.0, data=1.0, warm_up=11.0, training=5.0, export=3.0))
    assert (start.launch, start.rest) == (2.0, 3.0)
    assert start.first_step == 2 + 9 + 1 + 11
    assert start.first_step + start.training + start.rest == 31.0
    with_an_end = start_of("warm", 31.0, summary(start=20.0, training=5.0, export=3.0), ending=1.5)
    assert (with_an_end.launch, with_an_end.rest, with_an_end.first_step) == (1.5, 4.5, 21.5)
    without_warm_up = start_of("warm", 12.0, summary(start=9.0, training=2.0))
    assert (without_warm_up.first_step, without_warm_up.rest) == (10.0, 0.0)
    text = table([start, without_warm_up, start_of("warm", 14.0, summary(start=11.0, training=2.0))])
    assert "| warm, median | **11.0** (10.0–12.0) |" in text


def test_caches_are_in_the_folder_inside_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHES[0], "elsewhere")
    monkeypatch.delenv(CACHES[1], raising=False)
    with caches_in(tmp_path):
        assert all(os.environ[name].startswith(str(tmp_path)) for name in CACHES)
    assert (os.environ[CACHES[0]], os.environ.get(CACHES[1])) == ("elsewhere", None)


@pytest.mark.more
def test_a_cold_fit_and_a_warm_one_are_told(tmp_path, capsys):
    write_data(tmp_path / "data")
    net = [part for name, value in NET.items() for part in (f"--model.net.{name}", str(value))]
    options = ["--trainer.accelerator", "cpu", "--data.seq_len", "32", "--data.micro_batch_size", "1", *net]
    options += ["--model.compile", "false", "--export.enabled", "false", "--data.val_tokens_limit", "64"]
    options += ["--trainer.max_steps", "3"]
    line = ["--config", "demo.yaml", "--data_dir", str(tmp_path / "data"), "--steps", "2", "--repeats", "1"]
    main([*line, "--out", str(tmp_path / "out"), "--", *options])
    told = capsys.readouterr().out
    starts = json.loads((tmp_path / "out" / "starts.json").read_text())
    assert [start["caches"] for start in starts] == ["cold", "warm"]
    assert all(start["start"] > 0.5 and start["training"] > 0 for start in starts)
    assert all(start["rest"] > start["launch"] for start in starts), "the process's end comes after the last step"
    assert (tmp_path / "out" / "table.md").read_text() in told
    assert ", 3 steps\n" in told
    assert any((tmp_path / "out" / "caches").rglob("*"))
    with pytest.raises(ValueError, match="--run_dir behind -- would put every run in one folder: leave it out"):
        main([*line, "--out", str(tmp_path / "new"), "--", f"--run_dir={tmp_path / 'elsewhere'}"])
    main([*line, "--out", str(tmp_path / "out"), "--", *options])
    assert json.loads((tmp_path / "out" / "starts.json").read_text()) == starts, "what was measured is not run again"
    assert capsys.readouterr().out == told[told.index("1 ×") :]
    with pytest.raises(ValueError, match="holds a run with other options"):
        main([*line, "--out", str(tmp_path / "out"), "--", *options, "--model.log_every_n_steps", "1"])
    with pytest.raises(ValueError, match="--repeats must be at least 1, got 0"):
        main([*line, "--out", str(tmp_path / "new"), "--repeats", "0"])


def test_what_an_interrupted_study_left_is_measured_anew(tmp_path, monkeypatch):
    out, ran = tmp_path / "out", []

    def run(command, run_dir, result, arguments):
        assert not run_dir.exists()
        if run_dir.name == "start-0":
            assert not (out / "caches").exists()
        for part in (run_dir, out / "caches"):
            part.mkdir(parents=True, exist_ok=True)
        (run_dir / "fit_arguments.json").write_text("[]")
        ran.append(run_dir.name)
        if len(ran) in (1, 3):
            raise RunFailedError("out of memory")
        (run_dir / result).write_text("{}")
        return summary(start=1.0, training=1.0) | {"steps": 2, "environment": {}}

    monkeypatch.setattr(start_time, "run_once", lambda *a: run(*a) if not (a[1] / a[2]).exists() else ran_before)
    monkeypatch.setattr(start_time, "hardware", lambda environment: "a machine")
    ran_before = {"steps": 2, "environment": {}}
    line = ["--data_dir", "data", "--out", str(out), "--repeats", "1"]
    for _ in range(2):
        with pytest.raises(RunFailedError):
            main(line)
    main(line)
    assert ran == ["start-0", "start-0", "start-1", "start-1"]


@pytest.mark.parametrize("name", ["notes.txt", "start-0", "start-1", "summary.json"])
def test_a_folder_with_anything_else_is_left_alone(tmp_path, name):
    kept = tmp_path / name / "summary.json" if name == "start-0" else tmp_path / name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(ValueError, match="is not empty, and its caches would not be cold: give a new folder"):
        main(["--data_dir", "data", "--out", str(tmp_path)])
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("text", ["[{}]", "{", "[1]", '{"a": 1}'])
def test_damaged_measurements_are_told(tmp_path, text):
    (tmp_path / "starts.json").write_text(text)
    with pytest.raises(ValueError, match=r"starts\.json is damaged"):
        main(["--data_dir", "data", "--out", str(tmp_path)])
