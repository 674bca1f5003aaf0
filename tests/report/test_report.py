"""The report: everything in one file, every figure drawn, differences found, damaged and killed runs told apart."""

import html
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from changed import change_json, truncate
from hypothesis import given
from hypothesis import strategies as st

from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.commands import run_command
from hymba_lightning.report import charts, treemap
from hymba_lightning.report.charts import Chart, Series, ticks
from hymba_lightning.report.page import build_charts, write_report
from hymba_lightning.report.runs import differences, load_runs
from hymba_lightning.text import printable

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
    for value in (
        f"{summary['bpb']['artifact']:.4f}",
        f"{test['ttt_bpb']:.4f}",
        f"{summary['artifact_bytes']:,}",
        f"{summary['parameters']:,}",
        summary["environment"]["torch"],
    ):
        assert value in text
    differing = text.partition("What differs")[2].partition("</section>")[0]
    assert re.findall(r"<tr><td>(.*?)</td>", differing) == ["model.net.window"]
    assert "77" in differing


def test_every_figure_is_there_twice_as_svg_and_png(runs, report):
    names = {"loss", "validation", "stages", "ttt", "context", "phases", "step_time", "lr"}
    assert {path.stem for path in report.parent.glob("*.png")} == names | {"artifact-0", "artifact-1"}
    text = report.read_text()
    assert text.count("<svg") == len(names) + 2
    phases = text.partition("<b>Where the wall clock went</b>")[2].partition("</svg>")[0]
    bars = re.findall(r'<rect class="dot c(\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', phases)
    assert {color for color, *_ in bars} == {"0", "1"}
    heights = [float(height) for color, _, _, height in bars if color == "0"]
    seconds = load_runs([runs[0]])[0].phases
    assert len(heights) == phases.count('text-anchor="middle"') - 1, "a bar for each name under the axis"
    assert max(heights) / sum(heights) == pytest.approx(max(seconds.values()) / sum(seconds.values()), abs=0.03)
    # A line per run, and a dashed one for each score without adaptation.
    ttt = text.partition("<b>Test-time training</b>")[2].partition("</svg>")[0]
    assert ttt.count("<polyline") == 4
    assert ttt.count("stroke-dasharray") == 2


def test_one_validation_alone_is_no_curve(runs):
    run = load_runs([runs[0]])[0]
    run.val[:] = run.val[-1:]
    other = load_runs([runs[1]])[0]
    assert len(other.val) > 1
    drawn = {chart.name: chart.empty for chart in build_charts([run])}
    assert drawn["validation"]
    assert not drawn["stages"]
    (both,) = (chart for chart in build_charts([run, other]) if chart.name == "validation")
    assert [len(series.points) for series in both.series] == [1, len(other.val)]


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
    (whole,) = load_runs([runs[0]])
    (again,) = load_runs([killed])
    assert again.train == whole.train
    assert again.val[:1] == whole.val[:1]
    assert page.with_name("loss.png").is_file()


def test_a_damaged_artifact_is_a_note(runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    content = bytearray((broken / "artifact.hymba").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "artifact.hymba").write_bytes(content)
    (run,) = load_runs([broken])
    assert run.artifact is None
    assert "artifact.hymba cannot be loaded" in run.notes[0]


def test_two_reports_do_not_write_into_one_folder_at_once(runs, tmp_path):
    with (
        FolderClaim(tmp_path / "report", "hymba report"),
        pytest.raises(FolderInUseError, match="in use by hymba report"),
    ):
        write_report([str(runs[0])], str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


DAMAGE = {
    "config.yaml": lambda path: path.write_text("a: [1, {"),
    "summary.json": lambda path: path.write_text("{"),
    "test_summary.json": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "record.json": lambda path: path.write_text('{"version": 1}'),
    "history.json": lambda path: path.write_text("[1, 2]"),
    "artifact.hymba": truncate,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_the_rest_shown(runs, tmp_path, name):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0], damaged)
    DAMAGE[name](damaged / name)
    page = write_report([str(damaged), str(runs[1])], str(tmp_path / "report")).read_text()
    missing = page.partition("<h2>Missing</h2>")[2]
    assert f"<b>damaged</b>: {name}" in missing
    summary = json.loads((runs[0] / "summary.json").read_text())
    # Both runs' parameters, whatever else is missing: record and summary stand in for each other.
    assert page.count(f"{summary['parameters']:,}</td>") == 2
    assert f"{summary['bpb']['artifact']:.4f}" in page


def bomb(levels=40):
    """YAML of a few hundred bytes whose aliases stand for 2^levels values."""
    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels))]
    return "\n".join(lines) + f"\nmodel: {{a: {{b: *a{levels - 1}}}}}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", bomb()),
        ("config.yaml", "model: " + "{a: " * 300 + "1" + "}" * 300),
        ("history.json", '{"train": ' + '{"a": ' * 500 + "1" + "}" * 501),
        ("history.json", '{"train": ' + "[" * 100_000),
        ("record.json", '{"version": ' + "[" * 100_000),
        ("test_summary.json", '{"bpb_by_context": ' + "[" * 400 + "]" * 400 + "}"),
    ],
    ids=["aliases", "deep YAML", "deep JSON", "deeper JSON", "deep record", "deep test"],
)
def test_a_file_that_is_nested_without_end_is_named(runs, tmp_path, name, content):
    strange = tmp_path / "strange"
    shutil.copytree(runs[0], strange)
    (strange / name).write_text(content)
    page = write_report([str(strange)], str(tmp_path / "report")).read_text()
    assert f"<b>strange</b>: {name}" in page.partition("<h2>Missing</h2>")[2]


def test_a_damaged_checkpoint_of_a_killed_run_is_named(runs, tmp_path):
    killed = tmp_path / "killed"
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copy(runs[0] / "checkpoints" / "last.ckpt", killed / "checkpoints")
    truncate(killed / "checkpoints" / "last.ckpt")
    (run,) = load_runs([killed])
    assert any(note.startswith("checkpoints/last.ckpt is truncated") for note in run.notes), run.notes


@pytest.mark.parametrize(
    ("file", "values", "note"),
    [
        ("summary.json", {"parameters": "many", "steps": None, "unigram_bpb": [1]}, "unigram_bpb in summary.json"),
        ("summary.json", {"bpb": {"raw": "low"}}, "raw in summary.json"),
        ("summary.json", {"environment": [1]}, None),
        ("test_summary.json", {"chunk_bytes": [0, 0, 0]}, None),
        ("test_summary.json", {"chunk_bpb": [1.0, 1.0, 1.0]}, "do not add up"),
        ("test_summary.json", {"bpb_by_context": [{"at_least": 0, "bpb": 1.0, "n_tokens": 999}, 7]}, "1 of 2 rows"),
        ("history.json", {"train": [{"step": 1}, 5], "val": 7}, "2 of 2 rows"),
        ("history.json", {"val": [{"step": 1, "seconds": 1.0, "tokens": 1e300, "loss": 1e308, "bpb": -1e308}]}, None),
        (
            "record.json",
            {
                "trained": {
                    "steps": "x",
                    "tokens": 1,
                    "seconds": 1,
                    "budget_seconds": 1,
                    "parameters": 1,
                    "data": None,
                    "ended_by": "",
                }
            },
            "something in it is no number",
        ),
    ],
)
def test_values_of_other_kinds_are_left_out(runs, tmp_path, file, values, note):
    strange = tmp_path / "strange"
    shutil.copytree(runs[0], strange)
    change_json(strange / file, **values)
    page = write_report([str(strange)], str(tmp_path / "report")).read_text()
    assert "<title>Run strange</title>" in page
    if note is not None:
        assert note in page.partition("<h2>Missing</h2>")[2]


def test_several_runs_have_keys_where_a_screen_is_too_narrow_for_names(runs, report, tmp_path):
    text = report.read_text()
    head = text.partition("<h2>Results</h2>")[2].partition("</thead>")[0]
    assert re.findall(r'<i class="bg(\d)"></i><b>(\d)</b><span class=long>(\w+)</span>', head) == [
        ("0", "1", "run"),
        ("1", "2", "wide"),
    ]
    assert re.search(r"@media\(max-width:760px\).*\.head \.long\{display:none\}", text, re.DOTALL)
    # The keys are explained once, and stand at every chart.
    assert "<b>2</b>wide</span>" in text
    assert text.count("<span class=keys><span") == 8
    alone = write_report([str(runs[0])], str(tmp_path / "report")).read_text()
    assert "<b>1</b>" not in alone


HOSTILE = ["<b>&x", "$x$", "[red]x", "$\\frac{", "\x1b[31mred", "_hidden", "a\nb", "\udcff", "'\"><script>", "x" * 200]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_in_a_run_are_text(runs, tmp_path, name):
    hostile = tmp_path / name
    shutil.copytree(runs[0], hostile)
    page = write_report([str(hostile)], str(tmp_path / "report")).read_text()
    Balanced().feed(page)
    assert "<b>&x" not in page
    assert "<script" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page)
    if len(name) < 20:
        assert html.escape(printable(name)) in page
    assert (tmp_path / "report" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "report" / "artifact-0.png").is_file()


def test_the_page_names_no_folders(runs, tmp_path):
    home = tmp_path / "home" / "alice" / "run"
    shutil.copytree(runs[0], home)
    config = yaml.safe_load((home / "config.yaml").read_text())
    config["data"] |= {"data_dir": "/home/alice/my data", "tokenizer": "~alice/tokenizer.model"}
    config["trainer"]["logger"] = {"class_path": "x.Y", "init_args": {"save_dir": str(home / "logs")}}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    truncate(home / "artifact.hymba")
    page = write_report([str(home)], str(tmp_path / "report")).read_text()
    assert "alice" not in page
    assert str(tmp_path) not in page
    assert "<td>my data</td>" in page
    assert "<td>logs</td>" in page


def test_what_is_no_run_is_refused_with_a_remedy(runs, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"holds no run.*--run_dir"):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([runs[0], runs[0]])
    with pytest.raises(FileNotFoundError, match=r"holds no run"):
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


@pytest.mark.parametrize("tokens", [0.0, 3.0, 569_344.0])
def test_the_marks_of_one_point_alone_are_different_words(tokens):
    svg = charts.to_svg(Chart("one", "one", "tokens", "bits", [Series("one", [(tokens, 2.5)], markers=True)]))
    below = re.findall(r'text-anchor="middle">([^<]+)</text>', svg)
    assert len(below) == len(set(below)) > 2


def test_points_that_are_no_numbers_are_left_out_and_nothing_is_an_error(tmp_path):
    chart = Chart("c", "t", "x", "y", [Series("s", [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 4.0)])])
    assert charts.to_svg(chart).count("points=") == 1
    assert "nan" not in charts.to_svg(chart)
    empty = Chart("c", "t", "x", "y", [Series("s", [(0.0, math.nan)])])
    for draw in (charts.to_svg, lambda chart: charts.to_png(chart, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="no point"):
            draw(empty)
