"""PNG plots of a run: loss and bits per byte against time with the lr schedule, and the running score of the test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter

if TYPE_CHECKING:
    from hymba_lightning.evaluation.curve import CurvePoint
    from hymba_lightning.evaluation.score import Score
    from hymba_lightning.run.history import TrainRow, ValRow

INK, BLUE, ORANGE, GREY = "#22262b", "#2563a8", "#c8641e", "#9aa3ad"


def _figure(width: float, height: float, n_rows: int = 1, ratios: list[float] | None = None) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e4e7ea", linewidth=0.8)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, list(axes)


def save_figure(figure: Figure, path: Path) -> None:
    """Draws every text as it is, a name with dollar signs too; only numbers on an axis may be formulas (10²)."""
    numbers = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
               if not isinstance(axis.get_major_formatter(), FixedFormatter)
               for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)
    figure.savefig(path)


def plot_training(train: list[TrainRow], val: list[ValRow], stages: dict[str, float], path: Path,
                  unigram_bpb: float | None = None) -> Path:
    """Training loss (nats per token, left axis), bits per byte of validations and stages (right axis), lr scale below.

    Raises ValueError when there is no training row to draw.
    """
    if not train:
        raise ValueError("no training history to plot: the run logged no step")
    figure, (top, bottom) = _figure(8.2, 5.4, 2, [3.2, 1])
    seconds = np.array([row.seconds for row in train])
    top.plot(seconds, [row.loss for row in train], color=BLUE, linewidth=1.4, label="training loss")
    top.set_ylabel("training loss (nats per token)", color=BLUE)
    top.set_title("Training against the clock", color=INK, loc="left", fontsize=12)
    right = top.twinx()
    right.spines[["top"]].set_visible(False)
    right.set_ylabel("bits per byte (validation)", color=ORANGE)
    points = [(row.seconds, row.bpb) for row in val]
    if points:
        right.plot([p[0] for p in points], [p[1] for p in points], color=ORANGE, marker="o", markersize=4)
    for (name, bpb), marker in zip(stages.items(), "s^Dv", strict=False):
        right.plot(seconds[-1], bpb, marker=marker, color=ORANGE, markersize=6, linestyle="none",
                   markeredgecolor=INK, label=f"{name} {bpb:.4f}")
    if unigram_bpb is not None:
        right.axhline(unigram_bpb, color=GREY, linestyle="--", linewidth=1, label=f"unigram {unigram_bpb:.3f}")
    if stages or unigram_bpb is not None:
        right.legend(loc="center right", bbox_to_anchor=(1, 0.6), fontsize=8, frameon=False)
    bottom.fill_between(seconds, [row.lr_scale for row in train], color=GREY, alpha=0.6, linewidth=0)
    bottom.set_ylim(0, 1.08)
    bottom.set_ylabel("lr scale")
    bottom.set_xlabel("training seconds")
    save_figure(figure, path)
    return path


def plot_ttt(scores: list[Score], tokens_per_chunk: int, path: Path, artifact_bpb: float | None = None) -> Path:
    """Running bits per byte of score-first test-time training against validation tokens, each chunk's own behind it.

    `artifact_bpb`, the score without adaptation, is drawn as a line where it is known. Raises ValueError for no chunks.
    """
    if not scores:
        raise ValueError("no chunk was scored: nothing to plot")
    figure, (axis,) = _figure(8.2, 4.0)
    total = scores[0]
    running = [total.bpb]
    for score in scores[1:]:
        total = total + score
        running.append(total.bpb)
    tokens = np.cumsum([score.n_tokens for score in scores])
    axis.plot(tokens, [score.bpb for score in scores], color=GREY, marker="o", markersize=3, linewidth=0.8,
              label="each chunk, scored before training on it")
    axis.plot(tokens, running, color=BLUE, linewidth=1.8, label=f"running score, {running[-1]:.4f} at the end")
    if artifact_bpb is not None:
        axis.axhline(artifact_bpb, color=ORANGE, linestyle="--", linewidth=1.2,
                     label=f"artifact without adaptation {artifact_bpb:.4f}")
    axis.set_xlabel("validation tokens scored")
    axis.set_ylabel("bits per byte")
    axis.set_title(f"Score-first test-time training, chunks of {tokens_per_chunk:,} tokens", color=INK, loc="left",
                   fontsize=12)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
    return path


def plot_context(by_context: list[CurvePoint], by_document: list[CurvePoint], path: Path, mode: str) -> Path:
    """Bits per byte against the tokens a target was predicted from, and against its place in the document, log scale.

    Each bin doubles; points sit at the bin's geometric middle, and their area says how much text is in it. Raises
    ValueError when there is nothing to draw.
    """
    if not by_context:
        raise ValueError("no token was scored: nothing to plot")
    figure, (axis,) = _figure(8.2, 4.0)
    most = max(point.n_tokens for point in by_context)
    for points, color, label in ((by_document, GREY, "place in the document"),
                                 (by_context, BLUE, "tokens it was predicted from")):
        middles = [point.at_least * 2**0.5 for point in points]
        axis.plot(middles, [point.bpb for point in points], color=color, linewidth=1.4, label=label)
        axis.scatter(middles, [point.bpb for point in points], color=color,
                     s=[6 + 50 * point.n_tokens / most for point in points])
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens before the scored one")
    axis.set_ylabel("bits per byte")
    axis.set_title(f"What context is worth, evaluation mode '{mode}'", color=INK, loc="left", fontsize=12)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
    return path
