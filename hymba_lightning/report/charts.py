"""Line charts: one description, drawn as SVG that follows the page's colours, or as PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_lightning.plots import panels, save_figure
from hymba_lightning.text import as_html, printable

COLORS = ("#2563a8", "#c8641e", "#2a8f6d", "#8a4fb0", "#b0304f", "#6b7480")

# Beyond this, as NaN and infinity, a number is none that a chart can show.
MOST = 1e30

# The drawing's own units; the page scales it. Small enough that its text is legible on a phone.
WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 40


@dataclass(frozen=True)
class Series:
    """One line. Points that are not finite are left out."""

    label: str
    points: list[tuple[float, float]]
    color: int = 0
    dashed: bool = False
    markers: bool = False
    faint: bool = False

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and abs(x) < MOST and abs(y) < MOST]


@dataclass(frozen=True)
class Chart:
    """What to draw."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    note: str = ""
    categories: tuple[str, ...] = ()
    """Names of the places 0, 1, … on the x axis."""
    bars: bool = False
    """Draw amounts as bars from zero at those places, a group of all series at each."""
    share: bool = False
    """The y axis goes from 0 to 1, so that chance looks like chance."""

    @property
    def empty(self) -> bool:
        """Nothing to draw."""
        return not any(self.points(series) for series in self.series)

    def points(self, series: Series) -> list[tuple[float, float]]:
        """Those of a series that have a place on the axes."""
        return [(x, y) for x, y in series.finite() if x > 0 or not self.log_x]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    if not high - low > 1e-300:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, more: int = 0) -> str:
    """4096 → 4.1K, 0.25 → 0.25. `more`: digits besides."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.{3 + more}g}{unit}"
    return f"{value:.{4 + more}g}"


def tick_labels(values: list[float]) -> list[str]:
    """A label for each tick, of as many digits as say where it lies, to a hundredth of the way to the next one."""
    gap = min((abs(b - a) for a, b in itertools.pairwise(values)), default=math.inf)
    for more in range(10):
        labels = [short(value, more) for value in values]
        if all(abs(_number(label) - value) < 0.01 * gap for label, value in zip(labels, values, strict=True)):
            break
    return labels


def _number(label: str) -> float:
    """What `short` made the label of."""
    unit = {"B": 1e9, "M": 1e6, "K": 1e3}.get(label[-1])
    return float(label) if unit is None else float(label[:-1]) * unit


def _power_label(value: float) -> str:
    return f"{round(value / 1024)}K" if value >= 1024 else f"{round(value)}"


def _limits(chart: Chart) -> tuple[float, float, float, float]:
    points = [point for series in chart.series for point in chart.points(series)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if len(ys) > 40:
        # The first steps of a loss curve would press everything else flat.
        y_high = min(y_high, sorted(ys)[int(0.985 * (len(ys) - 1))])
    if chart.bars:
        return -0.5, len(chart.categories) - 0.5, 0.0, 1.06 * max(y_high, 1e-9)
    if chart.share:
        y_low, y_high = min(0.0, y_low), max(1.0, y_high)
    margin = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    if chart.categories:
        return -0.3, len(chart.categories) - 0.7, y_low - margin, y_high + margin
    if x_low == x_high:
        wide = 0.05 * abs(x_low) or 0.5
        x_low, x_high = (x_low / 2, x_high * 2) if chart.log_x else (x_low - wide, x_high + wide)
    return x_low, x_high, y_low - margin, y_high + margin


def to_svg(chart: Chart) -> str:
    """The chart as an <svg> element; colours come from the page's CSS variables. Raises ValueError if empty."""
    if chart.empty:
        raise ValueError(f"chart {chart.name!r} has no point to draw")
    x_low, x_high, y_low, y_high = _limits(chart)

    def place(x: float, y: float) -> tuple[float, float]:
        a, b, c = (math.log(x), math.log(x_low), math.log(x_high)) if chart.log_x else (x, x_low, x_high)
        share = (a - b) / (c - b)
        height = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return (
            round(LEFT + share * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{as_html(chart.title)}">']
    heights = ticks(y_low, y_high)
    for value, label in zip(heights, tick_labels(heights), strict=True):
        _, y = place(x_high, value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    for value, label in _x_ticks(chart, x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{as_html(chart.x_label)}</text>"
        f'<text class="label" x="2" y="12">{as_html(chart.y_label)}</text>'
    )
    if chart.bars:
        for series, x, y in _bars(chart):
            (left, top), (right, bottom) = place(x, y), place(x + _bar_width(chart), 0.0)
            parts.append(
                f'<rect class="dot c{series.color % len(COLORS)}" x="{left}" y="{top}" '
                f'width="{round(right - left, 1)}" height="{round(bottom - top, 1)}"><title>'
                f"{as_html(series.label)}: {short(y)}</title></rect>"
            )
        return "".join(parts) + "</svg>"
    for series in chart.series:
        placed = [place(x, y) for x, y in chart.points(series)]
        style = f'class="line c{series.color % len(COLORS)}{" faint" if series.faint else ""}"'
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        if len(placed) > 1:
            parts.append(f'<polyline {style}{dash} points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
        if series.markers or len(placed) == 1:
            for (x, y), (raw_x, raw_y) in zip(placed, chart.points(series), strict=True):
                parts.append(
                    f'<circle class="dot c{series.color % len(COLORS)}" cx="{x}" cy="{y}" r="3.2"><title>'
                    f"{as_html(series.label)}: {raw_y:.4f} at {short(raw_x)}</title></circle>"
                )
    return "".join(parts) + "</svg>"


def _bar_width(chart: Chart) -> float:
    return 0.8 / len(chart.series)


def _bars(chart: Chart) -> Iterator[tuple[Series, float, float]]:
    """Each bar's series, left side and height."""
    for index, series in enumerate(chart.series):
        for x, y in chart.points(series):
            yield series, x - 0.4 + index * _bar_width(chart), y


def _x_ticks(chart: Chart, low: float, high: float) -> list[tuple[float, str]]:
    """Places on the x axis and their labels."""
    if chart.categories:
        return [(float(place), name) for place, name in enumerate(chart.categories)]
    powers: list[int] = []
    if chart.log_x:
        powers = list(range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1))
    if powers:
        return [(2.0**power, _power_label(2.0**power)) for power in powers[:: max(len(powers) // 6, 1)]]
    places = ticks(low, high)
    if _counts(chart):
        places = [place for place in places if float(place).is_integer()] or [low]
    return list(zip(places, tick_labels(places), strict=True))


def _counts(chart: Chart) -> bool:
    """Whether there is nothing between two whole numbers of the x axis, as between two layers."""
    places = {float(x) for series in chart.series for x, _ in series.finite()}
    return len(places) > 1 and all(place.is_integer() for place in places)


def to_png(chart: Chart, path: Path) -> Path:
    """The chart as a PNG file."""
    if chart.empty:
        raise ValueError(f"chart {chart.name!r} has no point to draw")
    figure, (axis,) = panels(8.2, 4.8)
    lines: list[Any] = []
    if chart.bars:
        for series in chart.series:
            lefts, heights = zip(*[(x, y) for own, x, y in _bars(chart) if own is series] or [(0.0, 0.0)], strict=True)
            color = COLORS[series.color % len(COLORS)]
            lines.append(axis.bar(lefts, heights, _bar_width(chart), align="edge", color=color))
    for series in () if chart.bars else chart.series:
        points = chart.points(series)
        lines += axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLORS[series.color % len(COLORS)],
            linestyle="--" if series.dashed else "-",
            linewidth=0.9 if series.faint else 1.6,
            alpha=0.55 if series.faint else 1.0,
            marker="o" if series.markers or len(points) == 1 else None,
            markersize=4,
        )
    if chart.log_x:
        axis.set_xscale("log", base=2)
    if chart.log_x or (_counts(chart) and not chart.categories):
        places, labels = zip(*_x_ticks(chart, *_limits(chart)[:2]), strict=True)
        axis.set_xticks(places, labels)
    if chart.categories:
        axis.set_xticks(range(len(chart.categories)), map(printable, chart.categories))
        axis.set_xlim(*_limits(chart)[:2])
    axis.set_ylim(*_limits(chart)[2:])
    axis.grid(True, axis="y", color="#e4e7ea", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel(printable(chart.x_label))
    axis.set_ylabel(printable(chart.y_label))
    axis.set_title(printable(chart.title), loc="left", fontsize=12)
    # Given with its lines, a label is shown whatever it begins with.
    axis.legend(lines, [printable(series.label) for series in chart.series], fontsize=8, frameon=False)
    save_figure(figure, path)
    return path
