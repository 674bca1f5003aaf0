"""The report: everything in one file, every figure drawn, differences found, damaged and killed runs told apart."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hymba_lightning.commands import run_command
from hymba_lightning.report import charts, treemap
from hymba_lightning.report.charts import Chart, Series, ticks
from hymba_lightning.report.page import write_report
from hymba_lightning.report.runs import differences, load_runs

VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of turn; keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def runs(fitted_run, tmp_path_factory):
    """A run, and a second one like it with another name and window."""
    run = fitted_run
    other = tmp_path_factory.mktemp("report") / "wide"
    shutil.copytree(run, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["net"]["window"] = 77
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    return run, other


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return write_report([str(run) for run in runs], str(tmp_path_factory.mktemp("out") / "report"))


def test_the_page_is_whole_and_takes_nothing_from_elsewhere(report):
    text = report.read_text()
    page = Balanced()
    page.feed(text)
    assert page.open == []
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text


def test_the_page_says_what_the_runs_files_say(runs, report):
    text = report.read_text()
    summary = json.loads((runs[0] / "summary.json").read_text())
    test = json.loads((runs[0] / "test_summary.json").read_text())
    for value in (f"{summary['bpb']['artifact']:.4f}", f"{test['ttt_bpb']:.4f}", f"{summary['artifact_bytes']:,}",
                  f"{summary['parameters']:,}", summary["environment"]["torch"]):
        assert value in text
    differing = text.partition("What differs")[2].partition("</section>")[0]
    assert re.findall(r"<tr><td>(.*?)</td>", differing) == ["model.net.window"]
    assert "77" in differing


def test_every_figure_is_there_twice_as_svg_and_png(report):
    names = {"loss", "validation", "stages", "ttt", "context", "step_time", "lr"}
    assert {path.stem for path in report.parent.glob("*.png")} == names | {"artifact-0", "artifact-1"}
    text = report.read_text()
    assert text.count("<svg") == len(names) + 2
    # A line per run, and a dashed one for each score without adaptation.
    ttt = text.partition("<b>Test-time training</b>")[2].partition("</svg>")[0]
    assert ttt.count("<polyline") == 4
    assert ttt.count("stroke-dasharray") == 2


def test_the_running_score_ends_at_the_tests(runs):
    run = load_runs([runs[0]])[0]
    points = run.running_ttt()
    assert points[-1] == (1.0, pytest.approx(run.test["ttt_bpb"], rel=1e-9))
    assert len(points) == run.test["chunks"] == 3


def test_a_killed_run_is_read_from_its_checkpoint(runs, tmp_path):
    killed = tmp_path / "killed"
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copy(runs[0] / "checkpoints" / "last.ckpt", killed / "checkpoints")
    shutil.copy(runs[0] / "config.yaml", killed)
    page = write_report([str(killed)], str(tmp_path / "report"))
    assert "was killed" in page.read_text()
    whole, = load_runs([runs[0]])
    again, = load_runs([killed])
    assert again.train == whole.train
    assert again.val[:1] == whole.val[:1]
    assert page.with_name("loss.png").is_file()


def test_a_damaged_artifact_is_a_note(runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    content = bytearray((broken / "artifact.hymba").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "artifact.hymba").write_bytes(content)
    run, = load_runs([broken])
    assert run.artifact is None
    assert "artifact.hymba cannot be loaded" in run.notes[0]


def test_names_in_a_run_cannot_become_markup(runs, tmp_path):
    hostile = tmp_path / "<b>&x"
    shutil.copytree(runs[0], hostile)
    page = write_report([str(hostile)], str(tmp_path / "report")).read_text()
    assert "<b>&x" not in page
    assert "&lt;b&gt;&amp;x" in page


def test_what_is_no_run_is_refused_with_a_remedy(runs, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"holds no run.*--run_dir"):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([runs[0], runs[0]])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        load_runs([tmp_path])
    with pytest.raises(SystemExit, match=r"hymba report: .*holds no run"):
        run_command("report", [str(tmp_path / "nowhere")])
    run_command("report", [str(runs[0]), "--out", str(tmp_path / "cli")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "cli" / "report.html")


def test_differences_name_missing_keys():
    assert differences([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == {"b": [2, 3], "c": [None, 4]}
    assert differences([{"a": 1}, {"a": 2}], ignored=["a"]) == {}


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_inside(low, span):
    high = low + span
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    slack = 1e-6 * max(abs(low), abs(high), 1) + 1e-9
    assert all(low - slack <= value <= high + slack for value in found)


@given(sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=60))
def test_a_map_shares_its_area_by_bytes_without_overlap(sizes):
    sizes = sorted(sizes, reverse=True)
    boxes = treemap.squarify(sizes, 0.0, 0.0, 460.0, 300.0)
    for size, (x, y, width, height) in zip(sizes, boxes, strict=True):
        assert width * height == pytest.approx(460 * 300 * size / sum(sizes), rel=1e-6)
        assert -1e-6 <= x <= x + width <= 460 + 1e-6
        assert -1e-6 <= y <= y + height <= 300 + 1e-6


def test_points_that_are_no_numbers_are_left_out_and_nothing_is_an_error(tmp_path):
    chart = Chart("c", "t", "x", "y", [Series("s", [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 4.0)])])
    assert charts.to_svg(chart).count("points=") == 1
    assert "nan" not in charts.to_svg(chart)
    empty = Chart("c", "t", "x", "y", [Series("s", [(0.0, math.nan)])])
    for draw in (charts.to_svg, lambda chart: charts.to_png(chart, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="no point"):
            draw(empty)
