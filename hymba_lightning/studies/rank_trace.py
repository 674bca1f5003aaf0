"""A picture of what a GPU did during some steps: whether the ranks' exchange lies beside computation or after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hymba_lightning.plots import BLUE, GREY, ORANGE, panels, save_figure

EXCHANGE = "exchange between ranks"
PHASES = ("forward and backward", "optimizer")
# What torch notes around the step of each of its optimizers: of notes inside one another a trace has the inner one.
TORCHS_NOTE = "Optimizer.step#"
REST = "other work"
COLOURS = {PHASES[0]: BLUE, PHASES[1]: GREY, EXCHANGE: ORANGE}


class Span(NamedTuple):
    """Work of one kind without a gap, in milliseconds from the first."""

    kind: str
    begin: float
    end: float


def on_the_gpu(trace: dict[str, Any]) -> list[Span]:
    """The kernels of a trace of `torch.profiler`, those of a kind that touch (to 5 µs) as one span.

    NCCL's kernels are the exchange, whatever asked for them; the others belong to the annotation around them.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    notes = [
        e | {"name": PHASES[1] if e["name"].startswith(TORCHS_NOTE) else e["name"]}
        for e in events
        if e.get("cat") == "gpu_user_annotation"
    ]
    notes = [note for note in notes if note["name"] in PHASES]
    if not work:
        return []
    start = min(event["ts"] for event in work)
    kinds: dict[str, list[tuple[float, float]]] = {}
    for event in work:
        middle = event["ts"] + event["dur"] / 2
        around = (note["name"] for note in notes if note["ts"] <= middle <= note["ts"] + note["dur"])
        kind = EXCHANGE if "nccl" in event["name"].lower() else next(around, REST)
        begin = (event["ts"] - start) / 1000
        kinds.setdefault(kind, []).append((begin, begin + event["dur"] / 1000))
    return [Span(kind, *pair) for kind, pairs in kinds.items() for pair in joined(pairs, 0.005)]


def joined(pairs: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """Intervals in order, those that overlap or lie within `gap` made one."""
    result: list[tuple[float, float]] = []
    for begin, end in sorted(pairs):
        if result and begin <= result[-1][1] + gap:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def beside(spans: Iterable[Span]) -> tuple[float, float]:
    """(milliseconds of exchange, those of them during which something else was computed)."""
    spans = list(spans)
    exchange = joined((s.begin, s.end) for s in spans if s.kind == EXCHANGE)
    other = joined((s.begin, s.end) for s in spans if s.kind != EXCHANGE)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in exchange for b in other)
    return sum(end - begin for begin, end in exchange), both


def draw(spans: list[Span], title: str, path: Path) -> str:
    """Draws the spans, a lane for each kind, and says in a sentence how much of the exchange was hidden."""
    kinds = [kind for kind in (*PHASES, REST, EXCHANGE) if any(span.kind == kind for span in spans)]
    figure, (axis,) = panels(9.0, 1.3 + 0.45 * len(kinds))
    for lane, kind in enumerate(reversed(kinds)):
        bars = [(span.begin, span.end - span.begin) for span in spans if span.kind == kind]
        axis.broken_barh(bars, (lane - 0.35, 0.7), color=COLOURS.get(kind, "#5d6670"), linewidth=0)
    axis.set_yticks(range(len(kinds)), list(reversed(kinds)))
    axis.set_xlabel("milliseconds")
    axis.set_title(title, loc="left", fontsize=11)
    save_figure(figure, path)
    total, hidden = beside(spans)
    return f"Exchange between ranks: {total:.2f} ms in the trace, {hidden:.2f} ms of them beside other work."
