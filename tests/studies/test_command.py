"""`hymba study`: listed without importing anything, explained, and refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hymba_lightning import studies
from hymba_lightning.errors import UsageError, is_user_error
from hymba_lightning.studies import STUDIES
from hymba_lightning.studies.paired import scores_of
from hymba_lightning.studies.runs import RunFailedError

HEAVY = {"torch", "numpy", "lightning", "jsonargparse", "matplotlib", "yaml"}


@pytest.mark.parametrize("args", [["study"], ["study", "--help"]], ids=" ".join)
def test_the_list_imports_nothing_heavy(args):
    code = f"""
import sys
sys.argv = ["hymba", *{args!r}]
from hymba_lightning.__main__ import main
main()
print("imported", *sorted({HEAVY!r} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *lines, imported = out.splitlines()
    assert imported == "imported"
    for name, (_, line) in STUDIES.items():
        assert [each.split(maxsplit=1)[1] for each in lines if each.split()[:1] == [name]] == [line]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as end:
        studies.run([name, "--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hymba study {name} [options]")
    assert " ".join(STUDIES[name][1].split())[1:40] in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["ablaton"], ["there is no study 'ablaton' (did you mean ablation?): choose from ablation, seeds, "]),
        (["bench_step"], ["did you mean step?"]),
        (["context_scaling"], ["did you mean context?"]),
        (["--out", "x"], ["--out comes before a study"]),
        (["seeds", "--out", "x", "--baselin", "1"], ["option --baselin", "--baseline?", "hymba study seeds --help"]),
        (["seeds", "--seeds", "1", "--", "--config", "demo"], ["--out is required: Folder of the runs"]),
        (
            ["ablation", "results", "--out", "x", "--", "--seed_everything", "5"],
            ["--seed_everything behind -- would give every run one seed, whatever --seeds says: leave it out"],
        ),
        (["seeds", "--out", "x", "--", "--ckpt_path=a.ckpt"], ["--ckpt_path behind -- would have every run go on"]),
        (["step", "--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["context", "--out", "x", "--seq_len", "8", "-8"], ["--seq_len must be at least 1, got -8"]),
        (["step", "--runtime.scan_backnd", "x"], ["option --runtime.scan_backnd", "--runtime.scan_backend?"]),
        (["step", "--steps", "x"], ["--steps", "'x'"]),
        (["kernels", "--only", "all"], ["streams"]),
        (["ablation", "nothing", "--out", "x"], ["nothing does not exist; shipped with the", ": ablations, results"]),
        (
            ["ttt", "nothing", "--out", "x", "--artifact", "a", "--data_dir", "d"],
            ["nothing does not exist", "ttt_recipes"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_not_understood_is_refused_in_one_sentence(args, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refusal:
        studies.run(args)
    assert len(str(refusal.value).splitlines()) == 1
    for part in parts:
        assert part in str(refusal.value)


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        studies.run(["ops", "--device", "gpu"])


def test_what_stands_behind_the_dashes_is_for_fit(tmp_path, monkeypatch):
    asked = {}

    def run_seeds(seeds, folder, arguments, **rest):
        asked.update(rest, seeds=seeds, folder=folder, arguments=arguments)
        return "the table"

    monkeypatch.setattr("hymba_lightning.studies.seeds.run_seeds", run_seeds)
    studies.run(["seeds", "--out", "runs", "--seeds", "3", "4", "--test", "false", "--", "--config", "demo", "--", "x"])
    assert asked["seeds"] == [3, 4]
    assert asked["folder"] == Path("runs")
    assert asked["arguments"] == ["--config", "demo", "--", "x"]
    assert asked["test"] is False
    assert asked["baseline"] == []


def test_a_study_whose_runs_failed_ends_with_their_logs_and_1(monkeypatch, capsys):
    def main(args):
        raise RunFailedError("hymba fit in x ended with code 3:\nthe reason")

    monkeypatch.setattr(import_module("hymba_lightning.studies.seeds"), "main", main)
    with pytest.raises(SystemExit) as end:
        studies.run(["seeds"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "hymba fit in x ended with code 3:\nthe reason\n"


def test_a_step_is_timed_from_the_command_line(capsys):
    size = ["--net.n_layers", "2", "--net.d_model", "32", "--net.n_heads", "2", "--net.n_kv_heads", "1"]
    studies.run(["step", "--seq_len", "32", "64", "--tokens", "64", "--steps", "2", "--compile", "false", *size])
    lines = capsys.readouterr().out.splitlines()
    assert "2 steps each, compiled: no" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["32", "64"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "no dict"),
        (b"{}", "lacks bpb"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(tmp_path, content, what):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"summary\.json is damaged \(.*{what}.*\): delete it") as refused:
        scores_of(tmp_path)
    assert is_user_error(refused.value)
