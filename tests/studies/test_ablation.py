"""Ablations: what is run with which options, and the tables of whole and of interrupted studies."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import yaml

from hymba_lightning.files import write_atomic
from hymba_lightning.options import shipped_configs
from hymba_lightning.studies import ablation
from hymba_lightning.studies.ablation import run_study
from hymba_lightning.studies.paired import report
from hymba_lightning.studies.runs import RunFailedError
from hymba_lightning.studies.variants import Study
from hymba_lightning.studies.worker import Worker

STUDY = Study(
    config=["base.yaml"],
    baseline="plain",
    test=True,
    common={"trainer.max_steps": 5},
    variants={"plain": {}, "wide": {"config": ["a.yaml", "b.yaml"], "model.net.window": 64}},
)


@pytest.fixture
def calls(monkeypatch):
    """Records the runs, and leaves what they would: 'wide' is 0.02 better, its seed 1 by 0.04."""
    made = []

    def fake(command, run_dir, result, arguments, *, worker, beside=()):
        made.append((command, run_dir.name, [*arguments, *beside], worker.environment))
        run_dir.mkdir(parents=True, exist_ok=True)
        name, seed = run_dir.name.rsplit("-", 1)
        bpb = 2.0 + int(seed) / 10 - (0.02 * (1 + int(seed)) if name == "wide" else 0.0)
        values = {"ttt_bpb": bpb - 0.1} if command == "test" else {"bpb": {"raw": bpb + 0.01, "ema": bpb}}
        if command == "fit" and name == "wide":
            values["artifact"] = "small.hymba"
            (run_dir / "small.hymba").write_bytes(b"")
        write_atomic(run_dir / f"{command}_arguments.json", json.dumps(arguments))
        write_atomic(run_dir / result, json.dumps(values))  # others read it meanwhile

    monkeypatch.setattr(ablation, "run_once", fake)
    return made


def test_options_config_and_test(calls, tmp_path):
    run_study(STUDY, [0, 1], tmp_path, ["--data.data_dir", "d"], ["3"])
    command, name, arguments, environment = calls[1]
    assert (command, name, environment) == ("fit", "wide-0", {"CUDA_VISIBLE_DEVICES": "3"})
    assert arguments == [
        "--config",
        "a.yaml",
        "--config",
        "b.yaml",
        "--trainer.max_steps",
        "5",
        "--model.net.window",
        "64",
        "--seed_everything",
        "0",
        "--data.data_dir",
        "d",
    ]
    assert calls[0][2][:2] == ["--config", "base.yaml"]
    # Only what wrote an artifact is tested, with the options it was trained with.
    assert [(c, n) for c, n, *_ in calls] == [
        ("fit", "plain-0"),
        ("fit", "wide-0"),
        ("test", "wide-0"),
        ("fit", "wide-1"),
        ("test", "wide-1"),
        ("fit", "plain-1"),
    ]
    assert calls[2][2] == [*arguments, "--ckpt_path", str(tmp_path / "wide-0" / "small.hymba")]


def test_tables_pair_by_seed(calls, tmp_path):
    table = run_study(STUDY, [0, 1], tmp_path, [], [None])
    assert (tmp_path / "table.md").read_text() == table
    assert "| plain | 2.0500 ± 0.0707 | – | – | 2 |" in table
    # Differences -20 and -40: their mean's error is 14.1 / √2, t = 3 with one degree of freedom.
    assert "| wide | 2.0200 ± 0.0566 | -30.0 ± 10.0 | 0.2 | 2 |" in table
    assert "| variant | raw weights | averaged weights |" in table
    assert "| plain | 2.0600 ± 0.0707 | 2.0500 ± 0.0707 |" in table
    assert "| wide | 2.0300 ± 0.0566 (-30.0 ± 10.0) | 2.0200 ± 0.0566 (-30.0 ± 10.0) |" in table
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "failure",
    [RunFailedError("hymba fit in wide-0 ended with code -6: CUDA error"), OSError(28, "No space left on device")],
    ids=["the run's", "the study's"],
)
def test_a_failed_run_costs_no_other(calls, tmp_path, monkeypatch, failure):
    works = ablation.run_once

    def fails_once(command, run_dir, *rest, **worker):
        if run_dir.name == "wide-0":
            raise failure
        works(command, run_dir, *rest, **worker)

    monkeypatch.setattr(ablation, "run_once", fails_once)
    with pytest.raises(
        RunFailedError, match=r"(?s)1 runs failed.*(wide-0 ended with code -6|wide seed 0: .*No space left)"
    ):
        run_study(STUDY, [0, 1], tmp_path, [], [None])
    assert "| wide | 2.0600 | -40.0 | – | 1 |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(ablation, "run_once", works)
    assert "| wide | 2.0200 ± 0.0566 | -30.0 ± 10.0 | 0.2 | 2 |" in run_study(STUDY, [0, 1], tmp_path, [], [None])


def test_a_fault_of_the_program_costs_no_other_run_and_says_where_it_is(calls, tmp_path, monkeypatch, capsys):
    works = ablation.run_once

    def stumbles(command, run_dir, *rest, **worker):
        if run_dir.name == "wide-0":
            {}["lost"]
        works(command, run_dir, *rest, **worker)

    monkeypatch.setattr(ablation, "run_once", stumbles)
    with pytest.raises(RunFailedError, match=r"(?s)1 runs failed.*wide seed 0: KeyError: lost"):
        run_study(STUDY, [0, 1], tmp_path, [], [None])
    said = capsys.readouterr().err
    assert '{}["lost"]' in said
    assert said.rstrip().endswith("KeyError: 'lost'")


def test_the_file_of_a_study_is_read_anew_for_every_run(calls, tmp_path, monkeypatch):
    path, out, works = tmp_path / "study.yaml", tmp_path / "out", ablation.run_once
    first = {"config": ["base.yaml"], "baseline": "plain", "variants": {"plain": {}, "wide": {}, "late": {}}}
    path.write_text(yaml.safe_dump(first, sort_keys=False))

    def changes_the_file(command, run_dir, *rest, **worker):
        if run_dir.name == "plain-0":
            variants = {"plain": {}, "new": {"seeds": [1], "model.net.window": 8}, "late": {}}
            path.write_text(yaml.safe_dump(first | {"variants": variants}, sort_keys=False))
        if run_dir.name == "late-0":
            path.write_text("variants: [")  # half written
        return works(command, run_dir, *rest, **worker)

    monkeypatch.setattr(ablation, "run_once", changes_the_file)
    run_study(path, [0, 1], out, [], [None])
    assert [name for _, name, *_ in calls] == ["plain-0", "late-0", "plain-1", "late-1", "new-1"]
    assert "--seeds" not in calls[4][2]
    rows = json.loads((out / "results.json").read_text())
    assert {(row["variant"], row["seed"]) for row in rows} == {
        ("plain", 0),
        ("plain", 1),
        ("new", 1),
        ("late", 0),
        ("late", 1),
    }
    assert {row["variant"]: row["options"] for row in rows}["new"] == {"seeds": [1], "model.net.window": 8}
    assert rows[0]["bpb"].keys() == {"raw", "ema"}


def test_a_process_goes_on_with_the_network_it_has_compiled(calls, tmp_path):
    narrow = {"model.net.window": 8}
    study = Study(
        config=["base.yaml"],
        baseline="plain",
        variants={
            "plain": {},
            "narrow": narrow,
            "fast": {"model.optimizer.matrix_lr": 0.1},
            "narrow and fast": narrow | {"model.optimizer.matrix_lr": 0.1},
        },
    )
    run_study(study, [0, 1], tmp_path, [], [None])
    assert [name for _, name, *_ in calls] == [
        "plain-0",
        "fast-0",
        "narrow-0",
        "narrow and fast-0",
        "narrow-1",
        "narrow and fast-1",
        "plain-1",
        "fast-1",
    ]
    calls.clear()
    (tmp_path / "fast-1" / "summary.json").unlink()
    run_study(study, [0, 1], tmp_path, [], [None])
    assert [name for _, name, *_ in calls] == ["fast-1"]  # what ended is not run again


def test_a_watched_study_waits_for_more_until_it_is_told_to_stop(calls, tmp_path, monkeypatch):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    text = {"config": ["base.yaml"], "baseline": "plain", "variants": {"plain": {}}}
    path.write_text(yaml.safe_dump(text))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 1:
            path.write_text(yaml.safe_dump(text | {"variants": {"plain": {}, "more": {}}}))
        else:
            (out / "stop").touch()

    monkeypatch.setattr(ablation.time, "sleep", sleep)
    assert "| more |" in run_study(path, [0], out, [], [None], watch=True)
    assert [name for _, name, *_ in calls] == ["plain-0", "more-0"]


def test_processes_on_one_device_take_turns(calls, tmp_path):
    run_study(STUDY, [0], tmp_path, [], ["0", "1"], per_device=2)
    fits = [(arguments, environment) for command, _, arguments, environment in calls if command == "fit"]
    assert len(fits) == 2
    for arguments, environment in fits:
        callback = json.loads(arguments[arguments.index("--trainer.callbacks+") + 1])
        assert callback["class_path"] == "hymba_lightning.studies.turn.DeviceTurn"
        device = environment["CUDA_VISIBLE_DEVICES"]
        assert callback["init_args"]["path"] == str(tmp_path / f"device-{device}.lock")


def test_report_of_an_interrupted_study(calls, tmp_path):
    run_study(STUDY, [0, 1], tmp_path, [], [None])
    (tmp_path / "wide-0" / "summary.json").unlink()
    table = report(STUDY, tmp_path, [0, 1, 2], ["wide"])  # and the baseline
    assert "| wide | 2.0600 | -40.0 | – | 1 |" in table  # seed 1 alone
    assert "| plain | 2.0500 ± 0.0707 | – | – | 2 |" in table
    for seed in (0, 1):
        (tmp_path / f"plain-{seed}" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run of the baseline 'plain'"):
        report(STUDY, tmp_path, [0, 1])
    with pytest.raises(ValueError, match=r"no such variants: \['narrow'\]"):
        report(STUDY, tmp_path, [0, 1], ["narrow"])


def test_an_ended_run_whose_options_have_changed_is_not_taken_for_the_new_one(calls, tmp_path):
    run_study(STUDY, [0], tmp_path, [], [None])
    calls.clear()
    run_study(STUDY, [0], tmp_path, [], [None])
    assert calls == []
    changed = dataclasses.replace(STUDY, variants=STUDY.variants | {"plain": {"model.net.window": 8}})
    run_study(changed, [0], tmp_path, [], [None])
    assert [name for _, name, *_ in calls] == ["plain-0"]  # where the real run_once refuses it


def test_a_run_of_other_options_or_text_stands_in_no_table(calls, tmp_path):
    run_study(STUDY, [0, 1], tmp_path, [], [None])
    changed = dataclasses.replace(STUDY, variants=STUDY.variants | {"wide": {"model.net.window": 8}})
    table = report(changed, tmp_path, [0, 1])
    assert "| plain | 2.0500 ± 0.0707 | – | – | 2 |" in table
    assert "| wide |" not in table
    assert "left out: wide-1, of other options (--config a.yaml --config b.yaml --model.net.window 64 where" in table
    assert {row["variant"] for row in json.loads((tmp_path / "results.json").read_text())} == {"plain"}
    # One seed's data were prepared anew before the second variant.
    for name, data in (("plain-0", "a"), ("wide-0", "b"), ("plain-1", "b"), ("wide-1", "b")):
        path = tmp_path / name / "summary.json"
        summary = json.loads(path.read_text())
        scores = {stage: {"data": data, "tokenizer": "t", "tokens": 9, "bytes": 9} for stage in summary["bpb"]}
        path.write_text(json.dumps(summary | {"scores": scores}))
    table = report(STUDY, tmp_path, [0, 1])
    assert "| wide | 2.0600 | -40.0 | – | 1 |" in table
    assert "left out: wide-0, scored on other text than plain-0 (raw, ema)" in table


def test_an_interrupted_study_has_its_runs_save_what_they_have(tmp_path, monkeypatch, ctrl_c):
    stopped, started = threading.Event(), []

    def waits(*_, **__):
        started.append(1)
        threading.Timer(0.05, ctrl_c).start()
        assert stopped.wait(20)
        raise RunFailedError("hymba fit ended with code 143")

    monkeypatch.setattr(ablation, "run_once", waits)
    monkeypatch.setattr(Worker, "stop", lambda _: stopped.set())
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, [0, 1], tmp_path, [], [None])
    assert len(started) == 1  # and nothing that was waiting


def test_variants_that_none_of_the_seeds_is_for_are_told(tmp_path):
    study = dataclasses.replace(STUDY, variants={name: {"seeds": [1337]} for name in STUDY.variants})
    with pytest.raises(
        ValueError, match=r"nothing to run: .* is for the seeds \[1337\] alone, and --seeds are \[0, 1\]"
    ):
        run_study(study, [0, 1], tmp_path, [], [None])
    some = dataclasses.replace(study, variants={**study.variants, study.baseline: {}})
    notes = some.without_seed([0], None)
    assert len(notes) == len(study.variants) - 1
    assert not any(note.startswith(study.baseline) for note in notes)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_different_numbers(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds must be one or more different numbers"):
        run_study(STUDY, seeds, tmp_path, [], [None])


@pytest.mark.parametrize("name", ["ablations", "results"])
def test_the_shipped_studies_are_studies(name):
    study = Study.from_yaml(shipped_configs("studies")[name])
    assert len(study.variants) >= 3
    known = shipped_configs()
    for config in [*study.config, *(file for changes in study.variants.values() for file in changes.get("config", []))]:
        assert Path(config).stem in known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: names with values are needed, such as "),
        ("config: [a.yaml]", "needs config, baseline, variants"),
        ("[1]", "holds a list"),
        ("variants: [", "line 2, column 1: this is no YAML"),
        ("config: a.yaml\nbaseline: a\nvariants: {a: {}}", "config is 'a.yaml'; a list of files is needed"),
        ("config: [a.yaml]\nbaseline: a\nvariants: [a]", r"variants is \['a'\]; names of options"),
        ("config: [a.yaml]\nbaseline: a\nvariants: {a: 3}", "a is 3; names of options with values are needed"),
        ("config: [a.yaml]\nbaseline: a\nvariants: {a: {config: b.yaml}}", "config of a is 'b.yaml'; a list of files"),
        ("config: [a.yaml]\nbaseline: a\nvariants: {a: {seeds: ['0']}}", r"seeds of a is \['0'\]; a list of numbers"),
        (
            "config: [a.yaml]\nbaseline: a\nvariants: {a: {seed_everything: 4}}",
            "a has seed_everything, which the study",
        ),
        (
            "config: [a.yaml]\nbaseline: a\ncommon: {run_dir: x}\nvariants: {a: {}}",
            "common has run_dir, which the study",
        ),
        ("config: [a.yaml]\nbaseline: a\nvariants: {a: {1: 2}}", "a has 1; options go by their names"),
        ("config: [a.yaml]\nbaseline: a\ntest: 'no'\nvariants: {a: {}}", "test is 'no'; true or false is needed"),
        ("config: [a.yaml]\nbaseline: a\nstage: [raw]\nvariants: {a: {}}", r"stage \['raw'\] is unknown"),
        ("config: [a.yaml]\nbaseline: a/b\nvariants: {a/b: {}}", "'a/b', which cannot name the folder of its runs"),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text, message):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"study\.yaml.*{message}"):
        Study.from_yaml(file)


def test_a_study_without_its_baseline_is_refused(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("config: [x.yaml]\nbaseline: none\nvariants: {a: {}}\n")
    with pytest.raises(ValueError, match="baseline 'none' is not among the variants"):
        Study.from_yaml(file)
    file.write_text("config: [x.yaml]\nbaseline: a\nstage: averaged\nvariants: {a: {}}\n")
    with pytest.raises(ValueError, match="stage 'averaged' is unknown, choose from raw, ema, artifact, ttt"):
        Study.from_yaml(file)
