"""The report's page: one HTML file with everything inside, for wide and narrow screens, light and dark."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.claim import FolderClaim
from hymba_lightning.evaluation.curve import MIN_TEXTS, MIN_TOKENS, is_shown
from hymba_lightning.files import write_atomic
from hymba_lightning.quantization import ArtifactReport
from hymba_lightning.report import charts, treemap
from hymba_lightning.report.charts import Chart, Series
from hymba_lightning.report.memory import memory_charts, memory_rows
from hymba_lightning.report.runs import STAGES, Run, differences, load_runs
from hymba_lightning.report.style import CSS
from hymba_lightning.text import as_html, printable

# As short as a place under a bar is narrow.
PHASE_NAMES = {
    "start": "start",
    "data": "data",
    "warm_up": "warm-up",
    "training": "training",
    "validation": "validat.",
    "checkpoints": "checkp.",
    "scoring": "scoring",
    "calibration": "calibr.",
    "export": "export",
    "summary": "summary",
}
# Where a run was written says nothing about what it was.
IGNORED_OPTIONS = ("run_dir", "overwrite", "ckpt_path", "config")


def write_report(run: Sequence[str], out: str = "report") -> Path:
    """Writes <out>/report.html and a PNG per figure; returns the page's path.

    Args:
        run: Folders of runs (--run_dir of `hymba fit`), finished, killed or still going.
        out: Folder to write.

    Raises:
        FileNotFoundError: A folder holds no run.
        FolderInUseError: Another process writes to `out`.
        ValueError: No run, or one twice. What is damaged is named on the page.
    """
    if not run:
        raise ValueError("no run to report on: give the folder of one or more")
    runs = load_runs(run)
    folder = Path(out).expanduser()
    drawn = [chart for chart in build_charts(runs) if not chart.empty]
    path = folder / "report.html"
    # The pictures of two reports must not come to lie beside each other's page.
    with FolderClaim(folder, "hymba report"):
        for chart in drawn:
            charts.to_png(chart, folder / f"{chart.name}.png")
        for index, one in enumerate(runs):
            if one.artifact:
                title = f"Artifact of {one.name}: {one.artifact.bytes:,} bytes"
                treemap.to_png(one.artifact, one.artifact_config, title, folder / f"artifact-{index}.png")
        write_atomic(path, build_page(runs, drawn))
    return path


def build_charts(runs: Sequence[Run]) -> list[Chart]:
    """Every chart, also those that have nothing to show."""
    numbered = list(enumerate(runs))
    names = [stage for stage in STAGES if stage != "unigram" and any(stage in run.stages for run in runs)]
    stages = [
        Series(
            run.name,
            [(float(place), run.stages[stage]) for place, stage in enumerate(names) if stage in run.stages],
            color,
            markers=True,
        )
        for color, run in numbered
    ]
    return [
        Chart(
            "loss",
            "Training loss",
            "training seconds",
            "nats per token",
            [Series(run.name, [(row["seconds"], row["loss"]) for row in run.train], color) for color, run in numbered],
        ),
        Chart(
            "validation",
            "Bits per byte while training",
            "tokens trained on",
            "bits per byte",
            [
                Series(run.name, [(row["tokens"], row["bpb"]) for row in run.val], color, markers=True)
                for color, run in numbered
                # The validation at the end alone is no curve; it stands among the stages.
                if any(len(one.val) > 1 for one in runs)
            ],
            note="Averaged weights on the validation stream.",
        ),
        Chart(
            "stages",
            "Bits per byte by stage",
            "",
            "bits per byte",
            stages,
            categories=tuple(names),
            note="Raw weights, their average, the reloaded artifact, test-time training.",
        ),
        Chart(
            "ttt",
            "Test-time training",
            "share of the stream scored",
            "bits per byte",
            [series for color, run in numbered for series in _ttt_series(run, color)],
            note="Running score; dashed: the artifact without adaptation.",
        ),
        Chart(
            "context",
            "What context is worth",
            "tokens before the scored one",
            "bits per byte",
            [
                Series(
                    run.name,
                    [
                        (point["at_least"] * 2**0.5, point["bpb"])
                        for point in run.test.get("bpb_by_context", [])
                        if point["at_least"] >= 1 and is_shown(point["at_least"], point["n_tokens"])
                    ],
                    color,
                    markers=True,
                )
                for color, run in numbered
            ],
            log_x=True,
            note=f"Bins of at least {MIN_TOKENS} tokens of {MIN_TEXTS} texts.",
        ),
        _phases(numbered),
        Chart(
            "step_time",
            "Time of a step",
            "training seconds",
            "milliseconds",
            [Series(run.name, run.step_times(), color) for color, run in numbered],
        ),
        Chart(
            "lr",
            "Learning-rate scale",
            "training seconds",
            "factor",
            [
                Series(run.name, [(row["seconds"], row["lr_scale"]) for row in run.train], color)
                for color, run in numbered
            ],
        ),
        *memory_charts(numbered),
    ]


def _ttt_series(run: Run, color: int) -> list[Series]:
    running = run.running_ttt()
    series = [Series(run.name, running, color, markers=len(running) < 30)]
    plain = run.without_adaptation
    if plain is not None and running:
        series.append(Series(f"{run.name}, not adapted", [(running[0][0], plain), (1.0, plain)], color, dashed=True))
    return series


def build_page(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    """The whole page as text."""
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    chips = "".join(
        f'<span class="chip">{_key(color, len(runs))}{as_html(run.name)}</span>' for color, run in enumerate(runs)
    )
    keys = "".join(f'<span class="key">{_key(color, len(runs))}</span>' for color in range(len(runs)))
    shown = [(chart.name.startswith("memory_"), _figure(chart, keys if len(runs) > 1 else "")) for chart in drawn]
    figures, memory = ("".join(figure for one, figure in shown if one == kind) for kind in (False, True))
    parts = memory_rows(runs)
    if parts:
        unit = "<p class=muted>Thousandths of a bit a byte worse, ± one standard error over the sequences.</p>"
        memory = unit + _run_table("without", runs, parts, numbers=True) + f'<div class="grid2">{memory}</div>'
    maps = "".join(_map(run.name, run.artifact, run.artifact_config) for run in runs if run.artifact)
    notes = "".join(f"<li><b>{as_html(run.name)}</b>: {as_html(note)}</li>" for run in runs for note in run.notes)
    environment = _environment(runs)
    sections = [
        f"<header><h1>{as_html(title)}</h1><p>{chips}</p>"
        f"<p class=muted>hymba_lightning, written {written}</p></header>",
        f"<section><h2>Results</h2>{_results(runs)}</section>",
        f'<section><h2>Curves</h2><div class="grid2">{figures}</div></section>' if figures else "",
        f"<section><h2>What the memory is worth</h2>{memory}</section>" if memory else "",
        f'<section><h2>Where the artifact\'s bytes are</h2>{_legend()}<div class="grid2">{maps}</div></section>'
        if maps
        else "",
        f"<section><h2>What differs</h2>{_config_difference(runs)}</section>"
        if len(runs) > 1
        else f"<section><h2>Config</h2>{_config(runs[0])}</section>",
        f"<section><h2>Environment</h2>{environment}</section>" if environment else "",
        f"<section><h2>Missing</h2><ul>{notes}</ul></section>" if notes else "",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{as_html(title)}</title><style>{CSS}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _key(color: int, count: int) -> str:
    """HTML of a run's colour, with its number if there are several runs: used where its name would be too long."""
    return f'<i class="bg{color % len(charts.COLORS)}"></i>' + (f"<b>{color + 1}</b>" if count > 1 else "")


def _phases(numbered: Sequence[tuple[int, Run]]) -> Chart:
    """Where each run's wall clock went; what took no run a hundredth of its time is left out."""
    shares = [
        {name: seconds / max(sum(run.phases.values()), 1e-9) for name, seconds in run.phases.items()}
        for _, run in numbered
    ]
    names = [name for name in PHASE_NAMES if any(share.get(name, 0.0) >= 0.01 for share in shares)]
    return Chart(
        "phases",
        "Where the wall clock went",
        "",
        "seconds",
        [
            Series(run.name, [(float(place), run.phases.get(name, 0.0)) for place, name in enumerate(names)], color)
            for color, run in numbered
            if run.phases
        ],
        categories=tuple(PHASE_NAMES[name] for name in names),
        bars=True,
        note="From the start of the command to its last file.",
    )


def _figure(chart: Chart, keys: str) -> str:
    note = f" <span class=muted>{as_html(chart.note)}</span>" if chart.note else ""
    return (
        f"<figure><figcaption><b>{as_html(chart.title)}</b>{note} <span class=keys>{keys}</span></figcaption>"
        f"{charts.to_svg(chart)}</figure>"
    )


def _map(name: str, report: ArtifactReport, config: dict) -> str:
    largest = _table(
        ["tensor", "stored as", "bytes"],
        [[tensor.name, tensor.storage, f"{tensor.bytes:,}"] for tensor in report.largest(8)],
        numbers=1,
    )
    return (
        f"<figure><figcaption><b>{as_html(name)}</b> <span class=muted>{report.bytes:,} bytes</span>"
        f"</figcaption>{treemap.to_svg(report, config, name)}<details><summary>Largest tensors</summary>{largest}"
        "</details></figure>"
    )


def _legend() -> str:
    return (
        "<p>"
        + "".join(
            f'<span class="chip"><i class="map{index}"></i>{name}</span>' for index, name in enumerate(treemap.GROUPS)
        )
        + "</p>"
    )


def _results(runs: Sequence[Run]) -> str:
    rows: list[list[str]] = []

    def row(label: str, values: list[Any], form: str) -> None:
        if any(value is not None for value in values):
            rows.append([label, *("–" if value is None else format(value, form) for value in values)])

    for stage, label in STAGES.items():
        row(f"{label}, bits per byte", [run.stages.get(stage) for run in runs], ".4f")
    row("the tested weights without adaptation", [run.without_adaptation for run in runs], ".4f")
    for key, label, form in (
        ("steps", "steps", ",.0f"),
        ("train_seconds", "training seconds", ",.1f"),
        ("tokens", "tokens trained on", ",.0f"),
        ("tokens_per_s", "tokens per second", ",.0f"),
        ("parameters", "parameters", ",.0f"),
        ("artifact_bytes", "artifact bytes", ",.0f"),
        ("code_bytes", "evaluation code bytes", ",.0f"),
    ):
        row(label, [run.summary.get(key) for run in runs], form)
    row("share of the byte limit", [_share(run) for run in runs], ".1%")
    row("tokens scored", [run.tokens_scored for run in runs], ",.0f")
    row("test seconds", [run.test.get("seconds") for run in runs], ",.1f")
    row("tokens scored a second", [run.test.get("scored_tokens_per_s") for run in runs], ",.0f")
    row("milliseconds of a TTT update", [run.test.get("update_ms") for run in runs], ",.1f")
    rows.append(["validation data", *("unknown" if run.data is None else run.data.digest[:7] for run in runs)])
    known = {run.data for run in runs} - {None}
    apart = ""
    if len(known) > 1:
        apart = (
            "The runs were not scored on the same validation data with the same tokenizer: their bits per byte "
            "say little about each other."
        )
    elif known and any(run.data is None for run in runs):
        apart = "Of some runs it is not known on which data they were scored: their bits per byte may not compare."
    return _run_table("", runs, rows, numbers=True) + (f"<p class=muted>{apart}</p>" if apart else "")


def _share(run: Run) -> float | None:
    """Artifact and code as a share of the limit."""
    names = ("artifact_bytes", "code_bytes", "limit_bytes")
    if not all(run.summary.get(name) for name in names):
        return None
    artifact, code, limit = (run.summary[name] for name in names)
    return (artifact + code) / limit


def _config_difference(runs: Sequence[Run]) -> str:
    changed = differences([run.config for run in runs], IGNORED_OPTIONS)
    if not changed:
        return "<p class=muted>All options are the same.</p>"
    return _run_table("option", runs, [[key, *(_short(value) for value in values)] for key, values in changed.items()])


def _config(run: Run) -> str:
    rows = [[key, _short(value)] for key, value in run.config.items() if key not in IGNORED_OPTIONS]
    return f"<details><summary>{len(rows)} options</summary>{_run_table('option', [run], rows)}</details>"


def _environment(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    return (
        _run_table("", runs, [[key, *(_short(run.environment.get(key, "–")) for run in runs)] for key in keys])
        if keys
        else ""
    )


def _short(value: Any) -> str:
    return printable(str(value), 400)


def _run_table(first: str, runs: Sequence[Run], rows: list[list[str]], numbers: bool = False) -> str:
    """A column per run under its key and name; a narrow screen has room for the key only."""
    names = (
        [
            f'<span class="head">{_key(color, len(runs))}<span class=long>{as_html(run.name)}</span></span>'
            for color, run in enumerate(runs)
        ]
        if len(runs) > 1
        else [as_html(run.name) for run in runs]
    )
    return _table([as_html(first), *names], rows, numbers=len(runs) if numbers else 0)


def _table(head: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    """An HTML table. `head` is HTML already; the last `numbers` columns are aligned as numbers."""
    first = len(head) - numbers
    cells = "".join(
        "<tr>"
        + "".join(f"<td{' class=num' if i >= first else ''}>{as_html(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    heads = "".join(f"<th{' class=num' if i >= first else ''}>{cell}</th>" for i, cell in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'
