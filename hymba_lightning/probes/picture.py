"""The probe as one picture: loss by position, copying, recall, decay times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_lightning.plots import BLUE, GREY, INK, ORANGE, panels, save_figure
from hymba_lightning.probes.copying import Copy
from hymba_lightning.probes.decay import QUANTILES, Memory
from hymba_lightning.probes.positions import Curve
from hymba_lightning.probes.recall import Recall

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (BLUE, ORANGE, "#3b8c5a", "#8a4fa3", "#b3372f", "#5c7080", "#b8962e", "#2f9aa8", "#d0729b")
# Of a bin that doubles, from its start, on a logarithmic axis.
MIDDLE = 2**0.5


def draw(
    curves: Sequence[Curve],
    copies: Sequence[Copy],
    recalls: Sequence[Recall],
    memory: Sequence[Memory],
    log_length: float,
    path: Path,
) -> Path:
    """Writes a PNG of the panels that there is something for; distances go up to 2^log_length tokens."""
    # A last bin that ends behind its middle holds a target or two a sequence: noise, and it would leave the panel.
    curves = [
        curve._replace(bins=[point for point in curve.bins if MIDDLE * point.at_least <= 2.0**log_length])
        for curve in curves
    ]
    drawers: list[tuple[Callable[[Axes, Any], None], Sequence[Any]]] = [
        (_draw_worse, curves),
        (_draw_copies, copies),
        (_draw_recalls, recalls),
        (_draw_memory, memory),
    ]
    wanted = [(drawer, rows) for drawer, rows in drawers if rows]
    figure, axes = panels(8.2, 3.3 * len(wanted), len(wanted), grid=True)
    for axis, (drawer, rows) in zip(axes, wanted, strict=True):
        drawer(axis, rows)
        if drawer is not _draw_memory:
            axis.set_xscale("log", base=2)
            axis.set_xlim(right=2.0 ** (log_length + 0.1))
    save_figure(figure, path)
    return path


def _draw_worse(axis: Axes, curves: Sequence[Curve]) -> None:
    """What each part is worth: bits per byte lost without it, by position."""
    for curve, color in zip(curves[1:], COLORS * 2, strict=False):
        middle = [MIDDLE * point.at_least for point in curve.bins]
        worse = [1000 * point.worse for point in curve.bins]
        errors = [2000 * point.worse_error for point in curve.bins]
        axis.errorbar(
            middle,
            worse,
            errors,
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.7,
            label=curve.name,
        )
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylabel("thousandths of a bit a byte worse")
    axis.set_xlabel("tokens before the target in its sequence (bars: two standard errors)")
    axis.set_title("What each part of the memory is worth", color=INK, loc="left", fontsize=12)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_copies(axis: Axes, copies: Sequence[Copy]) -> None:
    errors = [2 * one.error for one in copies]
    axis.errorbar(
        [one.distance for one in copies], [one.gain for one in copies], errors, color=BLUE, marker="o", markersize=4
    )
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_ylabel("nats a token cheaper")
    axis.set_xlabel("tokens between a passage and its repetition")
    axis.set_title("Copying", color=INK, loc="left", fontsize=12)


def _draw_recalls(axis: Axes, recalls: Sequence[Recall]) -> None:
    for pairs, color in zip(dict.fromkeys(one.pairs for one in recalls), (BLUE, ORANGE), strict=False):
        rows = [one for one in recalls if one.pairs == pairs]
        axis.errorbar(
            [one.distance for one in rows],
            [one.right for one in rows],
            [2 * one.error for one in rows],
            color=color,
            marker="o",
            markersize=4,
            label="passkey" if pairs == 1 else f"one of {pairs} pairs",
        )
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("share right")
    axis.set_xlabel("tokens between the pair and the question")
    axis.set_title("Recall, after a short training on the task", color=INK, loc="left", fontsize=12)
    axis.legend(fontsize=8, frameon=False)


def _draw_memory(axis: Axes, memory: Sequence[Memory]) -> None:
    layers = [one.layer for one in memory]
    for index, quantile in enumerate(QUANTILES):
        shade = (0.35, 0.55, 0.8, 1.0)[index]
        axis.plot(
            layers,
            [one.tokens[index] for one in memory],
            color=BLUE,
            alpha=shade,
            marker="o",
            markersize=4,
            label=f"{quantile:.0%}",
        )
    axis.plot(
        layers,
        [one.longest for one in memory],
        color=ORANGE,
        marker="^",
        markersize=5,
        linestyle="none",
        label="longest",
    )
    axis.set_yscale("log")
    axis.set_xticks(layers)
    axis.set_xlabel("layer")
    axis.set_ylabel("tokens until 1/e")
    axis.set_title("How long states last, by share of the channels", color=INK, loc="left", fontsize=12)
    axis.legend(fontsize=8, frameon=False, ncols=5)
