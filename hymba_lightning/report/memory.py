"""What the report shows of a run's probe.json: what each part of the memory is worth, and how far it reaches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hymba_lightning.report.charts import Chart, Series
from hymba_lightning.report.reading import take_rows

if TYPE_CHECKING:
    from hymba_lightning.report.runs import Run

FILE = "probe.json"
CURVE = ("bpb", "worse", "worse_error")
COPY = ("distance", "gain", "error")
RECALL = ("pairs", "distance", "right", "error")
LAYER = ("layer", "tokens", "longest")
# Half of a layer's channels: the second of the quantiles.
HALF = 1


def read_probe(content: dict[str, Any], weights: set[str], notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What `hymba probe` measured of a network that is one of `weights` (SHA-256 of files or of their values).

    Returns lists named curves, copies, recalls and memory; empty, with a note, where the weights are others.
    """
    if not content:
        return {}
    if not weights & {str(content.get("file_sha256")), str(content.get("weights_sha256"))}:
        notes.append(f"{FILE} is not of this run's weights, or does not say of which: it is left out")
        return {}
    curves = []
    for one in _list(content.get("curves")):
        for row in take_rows(one, CURVE, FILE, notes):
            curves.append(row | {"name": str(one.get("name"))})
    layers = [
        {**one, "tokens": one["tokens"][HALF]}
        for one in _list(content.get("memory"))
        if isinstance(one, dict) and len(_list(one.get("tokens"))) > HALF
    ]
    return {
        "curves": curves,
        "copies": take_rows(content.get("copies"), COPY, FILE, notes),
        "recalls": take_rows(content.get("recalls"), RECALL, FILE, notes),
        "memory": take_rows(layers, LAYER, FILE, notes),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def memory_charts(numbered: Sequence[tuple[int, Run]]) -> list[Chart]:
    """Charts of all runs that were probed."""

    def by_length(what: str) -> list[Series]:
        """Of the cuts named `what` and a number of tokens."""
        return [
            Series(
                run.name,
                [
                    (float(tokens[1].replace(",", "")), 1000 * curve["worse"])
                    for curve in run.probe.get("curves", [])
                    if (tokens := re.fullmatch(f"{what}([0-9][0-9,]*)", curve["name"]))
                ],
                color,
                markers=True,
            )
            for color, run in numbered
        ]

    def by_distance(key: str, value: str, **only: float) -> list[Series]:
        return [
            Series(
                run.name,
                [
                    (row["distance"], row[value])
                    for row in run.probe.get(key, [])
                    if all(row[name] == wanted for name, wanted in only.items())
                ],
                color,
                markers=True,
            )
            for color, run in numbered
        ]

    return [
        Chart(
            "memory_state",
            "The recurrent state, emptied",
            "every so many tokens",
            "thousandths of a bit a byte",
            by_length("state emptied every "),
            log_x=True,
            note="Worse than with the whole memory.",
        ),
        Chart(
            "memory_window",
            "Attention's window, cut",
            "to so many tokens",
            "thousandths of a bit a byte",
            by_length("window cut to "),
            log_x=True,
            note="Worse than with the whole window.",
        ),
        Chart(
            "memory_copies",
            "A repeated passage",
            "tokens to its repetition",
            "nats a token cheaper",
            by_distance("copies", "gain"),
            log_x=True,
        ),
        Chart(
            "memory_passkey",
            "A passkey looked up",
            "tokens to the question",
            "share right",
            by_distance("recalls", "right", pairs=1),
            log_x=True,
            note="After a short training on it.",
            share=True,
        ),
        Chart(
            "memory_decay",
            "How long states last",
            "layer",
            "tokens until 1/e",
            [
                Series(
                    run.name,
                    [(row["layer"], row["tokens"]) for row in run.probe.get("memory", [])],
                    color,
                    markers=True,
                )
                for color, run in numbered
            ],
            note="Half of a layer's states; longer: the other half.",
        ),
    ]


def memory_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A table's rows: each part taken away, and by how many thousandths of a bit a byte each run is worse without."""
    names = list(dict.fromkeys(curve["name"] for run in runs for curve in run.probe.get("curves", [])))
    found = [{curve["name"]: curve for curve in run.probe.get("curves", [])} for run in runs]
    return [[name, *(_cell(curves.get(name), first=name == names[0]) for curves in found)] for name in names]


def _cell(curve: dict[str, Any] | None, first: bool) -> str:
    if curve is None:
        return "–"
    if first:
        return f"{curve['bpb']:.4f} bits a byte"
    return f"{1000 * curve['worse']:+.1f} ± {1000 * curve['worse_error']:.1f}"
