"""Names of runs, tensors and files are shown as they are: no formulas, no markup, nothing that steers a terminal."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from hymba_lightning.callbacks.summary import print_table
from hymba_lightning.evaluation.curve import CurvePoint
from hymba_lightning.plots import plot_context, save_figure
from hymba_lightning.report.charts import Chart, Series, to_png
from hymba_lightning.text import printable

NAMES = [
    "$x$",
    "$\\frac{",
    "a$b",
    r"$\mathdefault{",
    "[/red]x",
    "[bold]y",
    ":smile:",
    "\x1b[2Jz",
    "\u202eabc",
    "x\ny",
    "$" * 7,
    "ü 中",
]
POINTS = [CurvePoint(1, 2.0, 500), CurvePoint(2, 1.5, 500)]


@pytest.mark.parametrize("name", NAMES)
def test_charts_and_plots_are_drawn_whatever_the_names(tmp_path, name):
    chart = Chart(name="c", title=name, x_label=name, y_label=name, series=[Series(name, [(1.0, 2.0), (2.0, 3.0)])])
    assert to_png(chart, tmp_path / "a.png").stat().st_size > 5000
    assert plot_context(POINTS, POINTS, tmp_path / "b.png", name).is_file()


def test_a_formula_is_not_set_and_powers_on_an_axis_are(tmp_path):
    def drawn(title: str, math: bool) -> np.ndarray:
        figure = Figure(figsize=(4, 3))
        axis = figure.subplots()
        axis.plot([1, 1e5], [1, 2])
        axis.set_xscale("log")
        axis.set_title(title)
        (figure.savefig if math else lambda path: save_figure(figure, path))(tmp_path / "x.png")
        return matplotlib.image.imread(tmp_path / "x.png")

    assert not np.array_equal(drawn("$x^2$", True), drawn("$x^2$", False))
    assert np.array_equal(drawn("plain", True), drawn("plain", False))


@pytest.mark.parametrize("name", NAMES)
def test_the_closing_table_takes_any_name(name, capsys, tmp_path):
    print_table("Run", {"steps": 3, "mode": name, "bpb": {name: 1.5}}, tmp_path / name)
    said = capsys.readouterr().out
    if name.startswith(("[", ":")):
        assert name in said
    assert "\x1b[2J" not in said


def test_printable_leaves_text_and_takes_what_steers():
    assert printable("ü 中 $x$ [/red]") == "ü 中 $x$ [/red]"
    steering = "\x1b[31m\x07\r\n\t\x9b\u202e\u2066\ud800\x00"
    assert not any(character in printable(steering) for character in steering if character not in "[31m")
    assert len(printable("x" * 5000, 100)) < 110
