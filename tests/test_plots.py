"""The plots of a run: what belongs together shares an axis, and labels keep apart."""

from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from hymba_lightning import plots
from hymba_lightning.plots import plot_training, spread
from hymba_lightning.run.history import TrainRow, ValRow

TRAIN = [TrainRow(step, float(step), 100 * step, 7.0 / step + 2.0, 1.0 - step / 60, 100.0) for step in range(1, 60)]
VAL = [ValRow(step, float(step), 100 * step, 3.0, 3.0 / step + 1.3) for step in range(10, 60, 10)]
STAGES = {"raw": 1.3391, "ema": 1.3312, "artifact": 1.3345}


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, in the order of drawing."""
    drawn: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path)))
    return drawn


def test_loss_bits_per_byte_and_rate_have_panels_of_their_own_over_one_time(figures, tmp_path):
    plot_training(TRAIN, VAL, STAGES, tmp_path / "a.png", 3.4)
    axes = figures[0].axes
    assert ["loss" in axes[0].get_ylabel(), "bits per byte" in axes[1].get_ylabel(), axes[2].get_ylabel()] == [
        True,
        True,
        "lr scale",
    ]
    # No second scale in the place of another.
    boxes = [axis.get_position() for axis in axes]
    assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))
    assert len({axis.get_xlim() for axis in axes}) == 1


def test_the_final_stages_are_named_beside_the_panel_without_overlap(figures, tmp_path):
    plot_training(TRAIN, VAL, STAGES, tmp_path / "a.png", 3.4)
    figure, axis = figures[0], figures[0].axes[1]
    # Without the leaders from label to point.
    named = {
        text.get_text(): Text.get_window_extent(text)
        for text in axis.texts
        if not text.get_text().startswith("unigram")
    }
    assert set(named) == {f"{stage} {bpb:.4f}" for stage, bpb in STAGES.items()}
    boxes = list(named.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    frame = figure.bbox
    assert all(box.x0 > axis.bbox.x1 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_what_a_run_lacks_leaves_no_gap(figures, tmp_path):
    plot_training(TRAIN, [], {}, tmp_path / "a.png")
    plot_training(TRAIN[:1], [], {"raw": 1.0}, tmp_path / "b.png")
    plot_training(TRAIN, VAL, {"raw": float("nan")}, tmp_path / "c.png")
    assert [len(figure.axes) for figure in figures] == [2, 3, 3]
    assert np.ptp(matplotlib.image.imread(tmp_path / "a.png")) > 0


@given(st.lists(st.floats(0, 1), max_size=6))
def test_places_are_spread_in_order_and_inside(places):
    moved = spread(sorted(places), 0.13)
    assert len(moved) == len(places)
    assert all(b - a >= 0.13 - 1e-9 for a, b in pairwise(moved))
    assert all(-1e-9 <= place <= 1 for place in moved)
