"""One config over several seeds: every stage's mean ± std, and the p-value of being better than a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from hymba_lightning.files import write_atomic
from hymba_lightning.report.charts import Chart, Series, to_png
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import check_same_text, hardware, run_once
from hymba_lightning.studies.significance import better_than, scipy_stats

STAGES = {"raw": "raw weights", "ema": "averaged weights", "artifact": "artifact", "ttt": "after TTT"}


def run_seeds(
    seeds: Sequence[int],
    folder: Path,
    arguments: Sequence[str],
    *,
    baseline: Sequence[float] = (),
    margin: float = 0.0,
    test: bool = True,
) -> str:
    """Fits (and tests) once per seed, then writes table.md and seeds.png; returns the table.

    `arguments` are options of `hymba fit`, all of which `hymba test` gets too.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")
    if not all(math.isfinite(number) for number in (*baseline, margin)):
        raise ValueError(f"--baseline and --margin are numbers, got {list(baseline)} and {margin}")
    if baseline and len(seeds) > 1:
        scipy_stats()
    rows: list[dict] = []
    environment: dict = {}
    texts: dict[Path, dict] = {}
    for seed in seeds:
        run_dir = folder / f"seed-{seed}"
        options = [*arguments, "--seed_everything", str(seed)]
        summary = run_once("fit", run_dir, "summary.json", options)
        environment = summary["environment"]
        values = dict(summary["bpb"])
        texts[run_dir] = next(iter(summary.get("scores", {}).values()), {})
        check_same_text(texts)
        if test:
            weights = ["--ckpt_path", str(run_dir / summary.get("artifact", "checkpoints/last.ckpt"))]
            values["ttt"] = run_once("test", run_dir, "test_summary.json", options, beside=weights)["ttt_bpb"]
        rows.append(values | {key: summary.get(key) for key in ("steps", "artifact_bytes")})
    table = f"{hardware(environment)}, n = {len(seeds)}\n\n" + _table(seeds, rows)
    last = next(stage for stage in reversed(STAGES) if stage in rows[0])
    if baseline and len(seeds) > 1:
        found = better_than([row[last] for row in rows], baseline, margin)
        table += (
            f"\n{STAGES[last]} against a baseline of {statistics.mean(baseline):.4f} (n = {len(baseline)}): "
            f"lower by {found.difference:.4f}, t = {found.t:.2f} with {found.degrees:.1f} degrees of freedom, "
            f"one-sided p = {found.p:.2g} for a difference of more than {margin:g}\n"
        )
    write_atomic(folder / "table.md", table)
    stages = [stage for stage in STAGES if stage in rows[0]]
    lines = [
        Series(f"seed {seed}", [(float(place), row[stage]) for place, stage in enumerate(stages)], color, markers=True)
        for color, (seed, row) in enumerate(zip(seeds, rows, strict=True))
    ]
    to_png(
        Chart(
            "seeds",
            "Bits per byte by stage and seed",
            "",
            "bits per byte",
            lines,
            categories=tuple(STAGES[stage] for stage in stages),
        ),
        folder / "seeds.png",
    )
    return table


def _table(seeds: Sequence[int], rows: Sequence[dict]) -> str:
    columns = [key for key in (*STAGES, "steps", "artifact_bytes") if rows[0].get(key) is not None]
    lines = [
        "| seed | " + " | ".join(STAGES.get(key, key.replace("_", " ")) for key in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for seed, row in zip(seeds, rows, strict=True):
        lines.append(
            f"| {seed} | "
            + " | ".join(f"{row[key]:.4f}" if key in STAGES else f"{row[key]:,}" for key in columns)
            + " |"
        )
    cells = []
    for key in columns:
        values = [row[key] for row in rows]
        cells.append(mean_and_std(values) if key in STAGES else f"{statistics.mean(values):,.0f}")
    return "\n".join([*lines, "| mean ± std | " + " | ".join(cells) + " |"]) + "\n"


def mean_and_std(values: Sequence[float]) -> str:
    """Mean ± std, without the latter for a single value."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(args: list[str]) -> None:
    """`hymba study seeds`."""
    parser = StudyParser(
        "seeds",
        "With --baseline, also the one-sided p of Welch's t-test that ours are lower. Writes table.md and seeds.png. "
        "Example: hymba study seeds --out runs/seeds --baseline 1.1866 1.1881 1.1873 -- --config hymba_32k.yaml",
        of_fit=True,
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the runs, table.md and seeds.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 7], help="One run for each")
    parser.add_argument("--baseline", type=float, nargs="+", default=[], help="Bits per byte to be better than")
    parser.add_argument("--margin", type=float, default=0.0, help="By how much, in bits per byte")
    parser.add_argument("--test", type=bool, default=True, help="Also test-time training")
    options = parser.read(args)
    print(
        run_seeds(
            options.seeds,
            Path(options.out),
            parser.fit_options,
            baseline=options.baseline,
            margin=options.margin,
            test=options.test,
        )
    )
