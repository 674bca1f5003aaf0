"""The artifact as a map: a rectangle per tensor, its area the tensor's compressed bytes, grouped by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.patches import Rectangle
from torch import nn

from hymba_lightning.model import HymbaConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.mixer import HybridMixer
from hymba_lightning.model.roles import roles_of
from hymba_lightning.plots import panels, save_figure
from hymba_lightning.quantization import ArtifactReport
from hymba_lightning.report.charts import COLORS
from hymba_lightning.text import as_html, printable

WIDTH, HEIGHT = 460.0, 300.0
GROUPS = ("embedding", "attention", "recurrent", "mlp", "other")


class Tile(NamedTuple):
    """A tensor's rectangle in a WIDTH × HEIGHT drawing."""

    name: str
    group: int
    storage: str
    n_bytes: int
    x: float
    y: float
    width: float
    height: float


def parts_of(config: dict) -> dict[str, str]:
    """Name → one of GROUPS, for every parameter of a config's network: the part that the innermost module with one
    belongs to."""
    net = outline(HymbaConfig.from_dict(config))
    parts = {}
    for name in roles_of(net):
        module: nn.Module = net
        part = ""
        for piece in name.split("."):
            part = getattr(module, "part", "") or part
            if isinstance(module, HybridMixer) and piece in module.branch_names:
                part = "recurrent"
            module = getattr(module, piece)
        parts[name] = part or "other"
    return parts


def tiles(report: ArtifactReport, config: dict) -> list[Tile]:
    """Squarified layout (Bruls, Huizing and van Wijk, 2000), first of the groups, then of the tensors in each. `config`
    is that of the artifact's network."""
    parts = parts_of(config)
    members: dict[int, list] = {}
    for tensor in report.tensors:
        if tensor.bytes > 0:
            members.setdefault(GROUPS.index(parts[tensor.name]), []).append(tensor)
    order = sorted(members, key=lambda group: -sum(tensor.bytes for tensor in members[group]))
    outer = squarify([sum(tensor.bytes for tensor in members[group]) for group in order], 0.0, 0.0, WIDTH, HEIGHT)
    result = []
    for group, box in zip(order, outer, strict=True):
        inside = sorted(members[group], key=lambda tensor: -tensor.bytes)
        for tensor, (x, y, width, height) in zip(inside, squarify([t.bytes for t in inside], *box), strict=True):
            result.append(Tile(tensor.name, group, tensor.storage, tensor.bytes, x, y, width, height))
    return result


def squarify(sizes: list[int], x: float, y: float, width: float, height: float) -> list[tuple[float, ...]]:
    """(x, y, width, height) per size, sizes > 0 in descending order, in a box of that position and extent."""
    boxes: list[tuple[float, ...]] = []
    scale = width * height / sum(sizes)
    areas = [size * scale for size in sizes]
    while areas:
        side = min(width, height)
        row = [areas[0]]
        while len(row) < len(areas) and _worst([*row, areas[len(row)]], side) <= _worst(row, side):
            row.append(areas[len(row)])
        depth, offset = sum(row) / side, 0.0
        for area in row:
            length = area / depth
            boxes.append((x, y + offset, depth, length) if width >= height else (x + offset, y, length, depth))
            offset += length
        if width >= height:
            x, width = x + depth, width - depth
        else:
            y, height = y + depth, height - depth
        areas = areas[len(row) :]
    return boxes


def _worst(row: list[float], side: float) -> float:
    """The worst ratio of sides in a row laid along `side`."""
    total = sum(row)
    return max(side**2 * max(row) / total**2, total**2 / (side**2 * min(row)))


def _label(name: str) -> str:
    return re.sub(r"^\w+\.(\d+)\.(\w+\.)?", r"\1 ", name.removesuffix(".weight"))


def to_svg(report: ArtifactReport, config: dict, title: str) -> str:
    """The map as an <svg> element."""
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{as_html(title)}">']
    for tile in tiles(report, config):
        parts.append(
            f'<g><rect class="tile g{tile.group}" x="{tile.x:.1f}" y="{tile.y:.1f}" '
            f'width="{tile.width:.1f}" height="{tile.height:.1f}"/>'
            f"<title>{as_html(tile.name)}: {tile.n_bytes:,} bytes, {as_html(tile.storage)}</title>"
        )
        label = _label(tile.name)
        if tile.height > 15 and tile.width > 6.4 * len(label) + 6:
            parts.append(f'<text class="tiletext" x="{tile.x + 4:.1f}" y="{tile.y + 13:.1f}">{as_html(label)}</text>')
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def to_png(report: ArtifactReport, config: dict, title: str, path: Path) -> Path:
    """The map as a PNG file."""
    figure, (axis,) = panels(8.2, 5.6)
    for tile in tiles(report, config):
        axis.add_patch(
            Rectangle(
                (tile.x, tile.y),
                tile.width,
                tile.height,
                facecolor=COLORS[tile.group],
                edgecolor="white",
                linewidth=0.8,
            )
        )
        label = _label(tile.name)
        if tile.height > 12 and tile.width > 5.0 * len(label) + 6:
            axis.text(tile.x + 3, tile.y + 4, printable(label), fontsize=7, color="white", va="top")
    present = sorted({tile.group for tile in tiles(report, config)})
    axis.legend(
        handles=[Rectangle((0, 0), 1, 1, facecolor=COLORS[group], label=GROUPS[group]) for group in present],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=len(present),
        fontsize=8,
        frameon=False,
    )
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(HEIGHT, 0)
    axis.axis("off")
    axis.set_title(printable(title), loc="left", fontsize=12)
    save_figure(figure, path)
    return path
