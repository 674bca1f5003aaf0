"""PNG plots of a run: loss, bits per byte and lr schedule against time, and the running score of the test."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter

from hymba_lightning.evaluation.curve import MIN_TEXTS, MIN_TOKENS, is_shown
from hymba_lightning.files import write_atomic
from hymba_lightning.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hymba_lightning.evaluation.curve import CurvePoint
    from hymba_lightning.evaluation.score import Score
    from hymba_lightning.run.history import TrainRow, ValRow

INK, BLUE, ORANGE, GREY = "#22262b", "#2563a8", "#c8641e", "#9aa3ad"


def panels(
    width: float, height: float, n_rows: int = 1, *, grid: bool = False, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its panels, from the top; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = list(figure.subplots(n_rows, 1, squeeze=False, **options)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(True, color="#e4e7ea", linewidth=0.8)
            axis.tick_params(colors=INK, labelsize=9)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Draws every text as it is, a name with dollar signs too; only numbers on an axis may be formulas (10²)."""
    numbers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if not isinstance(axis.get_major_formatter(), FixedFormatter)
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".") or None)
    write_atomic(path, drawn.getvalue())


def plot_training(
    train: list[TrainRow], val: list[ValRow], stages: dict[str, float], path: Path, unigram_bpb: float | None = None
) -> Path:
    """Training loss (nats per token), bits per byte of validations and of the final stages, and the lr scale, each in
    a panel of its own over the same training seconds.

    Raises ValueError when there is no training row to draw.
    """
    if not train:
        raise ValueError("no training history to plot: the run logged no step")
    with_bpb = bool(val or stages)
    ratios = [2.4, 2.4, 1.0] if with_bpb else [2.4, 1.0]
    figure, axes = panels(
        8.2, 1.7 + 1.15 * sum(ratios) * 0.85, len(ratios), grid=True, sharex=True, height_ratios=ratios
    )
    seconds = np.array([row.seconds for row in train])
    losses = np.array([row.loss for row in train])
    axes[0].plot(seconds, losses, color=BLUE, linewidth=1.4)
    axes[0].set_ylabel("training loss\n(nats per token)")
    axes[0].set_title("Training against the clock", color=INK, loc="left", fontsize=12)
    _fit_height(axes[0], losses)
    if with_bpb:
        _draw_bpb(axes[1], val, stages, float(seconds[-1]), unigram_bpb)
    axes[-1].fill_between(seconds, [row.lr_scale for row in train], color=GREY, alpha=0.6, linewidth=0)
    axes[-1].set_ylim(0, 1.08)
    axes[-1].set_ylabel("lr scale")
    axes[-1].set_xlabel("training seconds")
    save_figure(figure, path)
    return path


def _fit_height(axis: Axes, values: np.ndarray) -> None:
    """The first values of a long curve would press everything else flat: they may leave the panel at its top."""
    finite = values[np.isfinite(values)]
    if len(finite) > 40:
        low, high = finite.min(), np.quantile(finite, 0.985)
        margin = 0.06 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)


def _draw_bpb(axis: Axes, val: list[ValRow], stages: dict[str, float], end: float, unigram_bpb: float | None) -> None:
    """Validations over time; the stages at the end of training, each with its name and number beside the panel."""
    axis.plot([row.seconds for row in val], [row.bpb for row in val], color=ORANGE, marker="o", markersize=4)
    axis.set_ylabel("bits per byte\n(validation)")
    if unigram_bpb is not None:
        axis.axhline(unigram_bpb, color=GREY, linestyle="--", linewidth=1)
        axis.annotate(
            f"unigram {unigram_bpb:.3f}",
            (0, unigram_bpb),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=INK,
            xytext=(4, 3),
            textcoords="offset points",
        )
    drawn = [(name, bpb) for name, bpb in stages.items() if np.isfinite(bpb)]
    for (_, bpb), marker in zip(drawn, "s^Dv", strict=False):
        axis.plot(end, bpb, marker=marker, color=ORANGE, markersize=6, linestyle="none", markeredgecolor=INK)
    low, high = axis.get_ylim()
    order = sorted(drawn, key=lambda stage: stage[1])
    heights = spread([(bpb - low) / (high - low) for _, bpb in order], 0.13)
    for (name, bpb), height in zip(order, heights, strict=True):
        axis.annotate(
            f"{name} {bpb:.4f}",
            (end, bpb),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            color=INK,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread(places: list[float], distance: float) -> list[float]:
    """Ascending places in 0 … 1, moved apart to at least `distance`; inside where all of them fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else place)
    ceiling = 1.0
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - distance
    return moved


def plot_ttt(scores: list[Score], tokens_per_chunk: int, path: Path, artifact_bpb: float | None = None) -> Path:
    """Running bits per byte of score-first test-time training against validation tokens, each chunk's own behind it.

    `artifact_bpb`, the score without adaptation, is drawn as a line where it is known. Raises ValueError for no chunks.
    """
    if not scores:
        raise ValueError("no chunk was scored: nothing to plot")
    figure, (axis,) = panels(8.2, 4.0, grid=True)
    total = scores[0]
    running = [total.bpb]
    for score in scores[1:]:
        total = total + score
        running.append(total.bpb)
    tokens = np.cumsum([score.n_tokens for score in scores])
    axis.plot(
        tokens,
        [score.bpb for score in scores],
        color=GREY,
        marker="o",
        markersize=3,
        linewidth=0.8,
        label="each chunk, scored before training on it",
    )
    axis.plot(tokens, running, color=BLUE, linewidth=1.8, label=f"running score, {running[-1]:.4f} at the end")
    if artifact_bpb is not None:
        axis.axhline(
            artifact_bpb,
            color=ORANGE,
            linestyle="--",
            linewidth=1.2,
            label=f"artifact without adaptation {artifact_bpb:.4f}",
        )
    axis.set_xlabel("validation tokens scored")
    axis.set_ylabel("bits per byte")
    axis.set_title(
        f"Score-first test-time training, chunks of {tokens_per_chunk:,} tokens", color=INK, loc="left", fontsize=12
    )
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
    return path


def plot_context(by_context: list[CurvePoint], by_document: list[CurvePoint], path: Path, mode: str) -> Path | None:
    """Bits per byte against the tokens a target was predicted from, and against its place in the document, log scale.

    Each bin doubles; points sit at the bin's geometric middle with bars of two standard errors. Bins that
    rest on too little (`is_shown`) are left out; None, and no file, where no bin is left.
    """
    curves = [
        ([point for point in points if is_shown(point.at_least, point.n_tokens)], color, label)
        for points, color, label in (
            (by_document, GREY, "place in the document"),
            (by_context, BLUE, "tokens it was predicted from"),
        )
    ]
    if not any(points for points, _, _ in curves):
        return None
    figure, (axis,) = panels(8.2, 4.0, grid=True)
    for points, color, label in curves:
        if points:
            axis.errorbar(
                [point.at_least * 2**0.5 for point in points],
                [point.bpb for point in points],
                yerr=[2 * point.error for point in points],
                color=color,
                marker="o",
                markersize=4,
                linewidth=1.4,
                elinewidth=1,
                capsize=2.5,
                label=label,
            )
    axis.set_xscale("log", base=2)
    bins = sorted({point.at_least for points, _, _ in curves for point in points})
    shown = bins[:: -(-len(bins) // 10)]
    axis.set_xticks(shown, [f"{at // 1024}K" if at >= 1024 else str(at) for at in shown])
    axis.minorticks_off()
    axis.set_xlabel("tokens before the scored one")
    axis.set_ylabel("bits per byte")
    axis.set_title(f"What context is worth, evaluation mode {printable(mode)}", color=INK, loc="left", fontsize=12)
    axis.text(
        1,
        1.02,
        f"bins of at least {MIN_TOKENS} tokens of {MIN_TEXTS} texts, bars ± 2 standard errors",
        transform=axis.transAxes,
        ha="right",
        fontsize=8,
        color=INK,
    )
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
    return path
