"""Draws block.svg, run.svg, way.svg, memory_27m.png, probe_27m.png and context_27m.png: `python docs/images/draw.py`.

All have a light ground of their own, so that they read on light and dark pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from hymba_lightning.probes.copying import Copy
from hymba_lightning.probes.decay import Memory
from hymba_lightning.probes.picture import draw
from hymba_lightning.probes.positions import Bin, Curve
from hymba_lightning.probes.recall import Recall

GROUND, LINE, INK, FAINT = "#fbfaf7", "#56606b", "#1d2329", "#5b6570"
GREY, BLUE, ORANGE, GREEN, VIOLET = "#eceae4", "#d5e4f5", "#f9dfc6", "#d8ecd4", "#e5dcf3"


class Picture:
    """An SVG that is put together from boxes, arrows and words."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str, *lines: str) -> None:
        """A rounded box whose first line is bold."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colour}" stroke="{LINE}"/>'
        )
        top = y + height / 2 - 9 * (len(lines) - 1)
        for row, line in enumerate(lines):
            first = row == 0
            self.word(
                x + width / 2,
                top + 18 * row,
                line,
                bold=first,
                colour=INK if first else FAINT,
                size=14 if first else 12,
            )

    def word(
        self, x: float, y: float, text: str, *, bold: bool = False, colour: str = INK, size: int = 14, anchor="middle"
    ) -> None:
        """Text around (x, y)."""
        weight = "600" if bold else "400"
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}" dominant-baseline="central">{text}</text>'
        )

    def sum(self, x: float, y: float, sign: str = "+") -> None:
        """A circle in which lines meet."""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="12" fill="{GREY}" stroke="{LINE}"/>')
        self.word(x, y, sign, bold=True)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through the points with a head at the last one."""
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"{dash} marker-end="url(#head)"/>'
        )

    def save(self, name: str) -> None:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">\n'
            f"<title>{self.title}</title>\n"
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>\n'
            f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>\n'
        )
        (Path(__file__).parent / name).write_text(head + "\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


def draw_block() -> None:
    """One block, left to right: the mix with x0, both branches, their merge, the MLP."""
    picture = Picture(1010, 330, "A block: sliding-window attention and a Mamba scan in parallel, then an MLP")
    middle = 150
    picture.word(26, middle - 16, "x")
    picture.arrow((14, middle), (58, middle))
    picture.box(60, middle - 26, 92, 52, GREY, "mix", "with x₀")
    picture.word(106, middle + 92, "embedded tokens x₀", colour=FAINT, size=13)
    picture.arrow((106, middle + 80), (106, middle + 27), dashed=True)
    picture.arrow((152, middle), (198, middle))
    picture.box(200, middle - 20, 62, 40, GREY, "norm")
    picture.arrow((262, middle), (284, middle), (284, 84), (314, 84))
    picture.arrow((284, middle), (284, 216), (314, 216))
    picture.box(
        316,
        42,
        222,
        84,
        BLUE,
        "sliding-window attention",
        "grouped heads, rotary positions",
        "exact, on the last tokens only",
    )
    picture.box(316, 174, 222, 84, ORANGE, "Mamba selective scan", "convolution, gate", "a state of all tokens before")
    picture.arrow((538, 84), (584, 84), (584, middle - 13))
    picture.arrow((538, 216), (584, 216), (584, middle + 13))
    picture.sum(584, middle, "α")
    picture.word(598, middle + 46, "α·attention", colour=FAINT, size=13, anchor="start")
    picture.word(598, middle + 63, "+ (1−α)·scan", colour=FAINT, size=13, anchor="start")
    picture.arrow((596, middle), (626, middle))
    picture.box(628, middle - 20, 62, 40, GREY, "W out")
    picture.arrow((690, middle), (720, middle))
    picture.sum(733, middle)
    picture.arrow((174, middle), (174, 22), (733, 22), (733, middle - 13))
    picture.arrow((745, middle), (772, middle))
    picture.box(774, middle - 31, 128, 62, GREEN, "norm, MLP", "leaky ReLU²")
    picture.arrow((902, middle), (928, middle))
    picture.sum(941, middle)
    picture.arrow((758, middle), (758, 84), (941, 84), (941, middle - 13))
    picture.arrow((953, middle), (996, middle))
    picture.word(
        505,
        302,
        "A layer remembers its last keys and values and the scan's state, no more: a sequence can be cut anywhere.",
        colour=FAINT,
    )
    picture.save("block.svg")


def draw_run() -> None:
    """The way from text to a score, with the command of each part."""
    draw_way(
        "run.svg",
        "A run: prepare, fit, test",
        ("any folder of it", "tokens", "32,768-token spans", "Hymba blocks", "Muon, Adam", "ends in time"),
        (
            "raw, averaged",
            "6 bits, zstd, < 16 MB",
            "bits per byte",
            "before any update",
            "a few steps",
            "numbers, pictures",
        ),
        ("hymba prepare", "hymba fit: the budget", "hymba fit: after the budget", "hymba test"),
    )


def draw_architecture() -> None:
    """The same, with the folder of each part."""
    draw_way(
        "way.svg",
        "The data's way through the code",
        ("data/prepare.py", "data/shards.py", "data/datamodule.py", "model/ on ops/", "training/", "callbacks/"),
        (
            "run/finish.py",
            "quantization/",
            "evaluation/",
            "evaluation/score.py",
            "evaluation/adapt.py",
            "run/, report/",
        ),
        ("data", "training", "the end of a run", "test-time training"),
    )


def draw_way(
    file: str, title: str, first: tuple[str, ...], second: tuple[str, ...], headings: tuple[str, str, str, str]
) -> None:
    """Twelve boxes in two rows, a word beneath the name of each."""
    picture = Picture(1010, 310, title)
    rows = (
        (60, ("text", "shards", "batches", "network", "optimizer", "clock, average"), first, [GREY] * 2 + [BLUE] * 4),
        (
            200,
            ("weights scored", "artifact", "reloaded, scored", "score a chunk", "train on it", "record, report"),
            second,
            [VIOLET] * 3 + [ORANGE] * 3,
        ),
    )
    for y, names, words, colours in rows:
        for column, (name, word, colour) in enumerate(zip(names, words, colours, strict=True)):
            x = 14 + 167 * column
            picture.box(x, y, 147, 62, colour, name, word)
            if column:
                picture.arrow((x - 20, y + 31), (x - 1, y + 31))
    picture.arrow((922, 122), (922, 161), (87, 161), (87, 199))
    picture.arrow((755, 262), (755, 284), (588, 284), (588, 263))
    picture.word(671, 298, "next chunk", colour=FAINT, size=13)
    for heading, x, y in zip(headings, (171, 588, 254, 671), (34, 34, 180, 180), strict=True):
        picture.word(x, y, heading, bold=True, colour=FAINT)
    picture.save(file)


def draw_memory() -> None:
    """What the 27M network's 32,768 tokens are worth: copying and recall by distance, and the whole probe."""
    here = Path(__file__).parent
    probe = json.loads((here.parents[1] / "results/probe_h200.json").read_text())
    copies, recalls = [Copy(**row) for row in probe["copies"]], [Recall(**row) for row in probe["recalls"]]
    draw([], copies, recalls, [], 15, here / "memory_27m.png")
    curves = [Curve(**row | {"bins": [Bin(**point) for point in row["bins"]]}) for row in probe["curves"]]
    draw(curves, copies, recalls, [Memory(**row) for row in probe["memory"]], 15, here / "probe_27m.png")


# Of #914, on 8 H100 and the challenge's text: bits per byte, ms a step.
REFERENCE = {8192: (1.1507, 79.0), 16384: (1.1491, 80.1), 32768: (1.1478, 80.6), 65536: (1.1477, 82.8)}
# Ours on one H200 (docs/results.md, commit aafdd09).
MILLISECONDS = {8192: 39.5, 32768: 40.0, 65536: 39.9}


def draw_context() -> None:
    """What a longer context costs and gains, on two texts and beside #914."""
    here = Path(__file__).parent
    results = here.parents[1] / "results"
    study = json.loads((results / "context_h200.json").read_text())
    default = [
        row for row in json.loads((results / "table_h200.json").read_text())["runs"] if row["variant"] == "default"
    ]
    base = {row["seed"]: row["bpb"]["raw"] for row in default}
    lengths = sorted(REFERENCE)
    web = {
        length: [1000 * (row["bpb"]["raw"] - base[row["seed"]]) for row in study["runs"] if row["seq_len"] == length]
        for length in lengths
    }
    web[32768] = [0.0]
    errors = [stdev(rows) / len(rows) ** 0.5 if len(rows) > 1 else 0.0 for rows in web.values()]
    books = {row["seq_len"]: row["bpb"]["raw"] for row in study["books"]}
    figure = Figure(figsize=(10, 3.6), dpi=130, layout="constrained")
    worth, cost = figure.subplots(1, 2)
    worth.errorbar(
        lengths, [mean(web[length]) for length in lengths], errors, marker="o", capsize=3, label="web text, n = 3"
    )
    worth.plot(
        lengths,
        [1000 * (books[length] - books[32768]) for length in lengths],
        marker="s",
        color="C1",
        label="books, n = 1",
    )
    worth.plot(
        lengths,
        [1000 * (REFERENCE[length][0] - REFERENCE[32768][0]) for length in lengths],
        marker="^",
        linestyle="--",
        color="C2",
        label="#914, the challenge's text",
    )
    worth.axhline(0, color=FAINT, linewidth=0.8)
    worth.set(title="what it is worth", ylabel="thousandths of a bit per byte\nagainst 32,768 (less is better)")
    cost.plot(list(MILLISECONDS), list(MILLISECONDS.values()), marker="o", label="one H200")
    cost.plot(
        lengths,
        [REFERENCE[length][1] for length in lengths],
        marker="^",
        linestyle="--",
        color="C2",
        label="#914, each of 8 H100",
    )
    cost.set(title="what it costs", ylabel="ms a step of 65,536 tokens a GPU", ylim=(0, 95))
    for axis in (worth, cost):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.set_xlabel("tokens of context, trained and scored with")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(here / "context_27m.png")


if __name__ == "__main__":
    draw_memory()
    draw_context()
    draw_block()
    draw_run()
    draw_architecture()
