"""The report shows no number beside another that it does not belong to."""

import dataclasses
import hashlib
import json
import re
import shutil

import pytest
from changed import change_json

from hymba_lightning.report.charts import Chart, Series, tick_labels, to_svg
from hymba_lightning.report.page import write_report
from hymba_lightning.report.runs import load_runs
from hymba_lightning.run.record import DataIdentity, RunRecord


def rewrite_test(run, **values):
    """Gives the test another identity, in the record and in test_summary.json alike."""
    record = RunRecord.load(run)
    record.scores = [dataclasses.replace(score, **values) if score.stage == "ttt" else score for score in record.scores]
    record.save(run)
    score = next(score for score in record.scores if score.stage == "ttt")
    change_json(
        run / "test_summary.json",
        weights_sha256=score.weights,
        data=score.data.digest,
        tokens=score.tokens,
        nats=score.nats,
        ttt_bpb=score.bpb,
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"weights": "0" * 64}, "was of other weights"),
        ({"data": DataIdentity("0" * 64, "1" * 64)}, "was on other data"),
    ],
)
def test_a_test_of_something_else_is_left_out_with_a_note(runs, tmp_path, values, why):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    rewrite_test(other, **values)
    (run,) = load_runs([other])
    assert "ttt" not in run.stages
    assert run.without_adaptation is None
    assert run.running_ttt() == []
    assert run.test["bpb_by_context"] == []
    assert any(why in note for note in run.notes)
    test = json.loads((runs[0] / "test_summary.json").read_text())
    page = write_report([str(other)], str(tmp_path / "report")).read_text().partition("<h2>Missing")[0]
    assert f"{test['ttt_bpb']:.4f}" not in page


def test_a_later_test_of_other_data_does_not_hide_the_runs_own(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    record = RunRecord.load(other)
    own = record.tested()
    record.add(dataclasses.replace(own, data=DataIdentity("0" * 64, "1" * 64), nats=2 * own.nats))
    record.save(other)
    (run,) = load_runs([other])
    assert run.stages["ttt"] == own.bpb
    assert any("other data" in note for note in run.notes)


def test_without_adaptation_needs_the_same_tokens(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    rewrite_test(other, tokens=500)
    (run,) = load_runs([other])
    assert run.stages["ttt"] == RunRecord.load(other).tested().bpb
    assert run.without_adaptation is None


def test_a_run_that_exported_nothing_shows_only_tests_of_its_own_weights(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    record = RunRecord.load(other)
    record.artifact = None
    record.save(other)
    summary = json.loads((other / "summary.json").read_text())
    summary["bpb"].pop("artifact")
    (other / "summary.json").write_text(json.dumps(summary))
    (run,) = load_runs([other])
    assert "ttt" not in run.stages
    assert "artifact_bytes" not in run.summary
    rewrite_test(other, weights=hashlib.sha256((other / "checkpoints" / "last.ckpt").read_bytes()).hexdigest())
    (run,) = load_runs([other])
    assert "ttt" in run.stages


def test_another_artifact_in_the_folder_is_not_the_runs(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    record = RunRecord.load(other)
    record.artifact.sha256 = "0" * 64
    record.save(other)
    (run,) = load_runs([other])
    assert run.artifact is None
    assert "artifact" not in run.stages
    assert any("is not the file that the fit exported" in note for note in run.notes)


def test_a_summary_that_the_record_does_not_bear_out_is_left_out(runs, tmp_path):
    forged = tmp_path / "forged"
    shutil.copytree(runs[0], forged)
    change_json(forged / "summary.json", bpb={"raw": 1.0, "ema": 1.0, "artifact": 1.0}, unigram_bpb=9.0)
    change_json(forged / "test_summary.json", ttt_bpb=0.5)
    (run,) = load_runs([forged])
    (whole,) = load_runs([runs[0]])
    assert run.stages == {stage: bpb for stage, bpb in whole.stages.items() if stage != "unigram"}
    assert any("summary.json has other scores" in note for note in run.notes)
    assert any("it says 0.5 bits per byte" in note for note in run.notes)
    assert run.running_ttt() == []


def test_a_run_from_before_there_were_records_is_shown_with_a_note(runs, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs[0], old)
    (old / "record.json").unlink()
    (run,) = load_runs([old])
    assert run.stages == load_runs([runs[0]])[0].stages
    assert any("no record.json" in note for note in run.notes)
    change_json(old / "test_summary.json", weights_sha256="0" * 64)
    (run,) = load_runs([old])
    assert "ttt" not in run.stages
    assert any("of other weights than summary.json's artifact" in note for note in run.notes)


def test_runs_on_different_data_are_told_apart(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    record = RunRecord.load(other)
    record.scores = [dataclasses.replace(score, data=DataIdentity("0" * 64, "1" * 64)) for score in record.scores]
    record.save(other)
    said = "not scored on the same validation data"
    assert said in write_report([str(runs[0]), str(other)], str(tmp_path / "a")).read_text()
    assert said not in write_report([str(run) for run in runs], str(tmp_path / "b")).read_text()


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("x", [1.0, 618_496.0, 72_418_781_191.0])
@pytest.mark.parametrize("apart", [[0], [0, 1], [0, 4096]])
def test_no_two_ticks_of_an_axis_have_one_label(x, apart, log_x):
    points = [(x + step, 2.077 + 1e-3 * place) for place, step in enumerate(apart)]
    svg = to_svg(Chart("validation", "", "tokens", "bits per byte", [Series("a", points)], log_x=log_x))
    for side in ("end", "middle"):
        labels = re.findall(rf'<text class="tick"[^>]*text-anchor="{side}">([^<]+)<', svg)
        assert labels
        assert len(set(labels)) == len(labels), labels


def test_a_ticks_label_says_where_it_lies():
    assert tick_labels([2.045, 2.0475, 2.05, 2.0525]) == ["2.045", "2.0475", "2.05", "2.0525"]
    assert tick_labels([0.0, 1250.0, 2500.0]) == ["0", "1.25K", "2.5K"]
    assert tick_labels([10_000.0, 10_250.0]) == ["10K", "10.25K"]
    assert tick_labels([3.0]) == ["3"]
