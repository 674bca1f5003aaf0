"""Runs `hymba fit` once per variant and seed, pairs the results by seed, and writes a table and a plot.

A run that has a summary.json is not run again, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hymba_lightning.files import write_atomic


@dataclass(frozen=True)
class Study:
    """What to compare. `common` and each variant are options of `hymba fit`, as name: value."""

    config: list[str]
    baseline: str
    variants: dict[str, dict[str, str]]
    common: dict[str, str] = field(default_factory=dict)
    stage: str = "ema"

    @classmethod
    def from_yaml(cls, path: Path) -> Study:
        """Reads a study. Raises ValueError naming the file and what it lacks."""
        values = yaml.safe_load(path.read_text())
        try:
            study = cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is no study ({error}): it needs config, baseline, variants") from error
        if study.baseline not in study.variants:
            raise ValueError(f"{path}: baseline {study.baseline!r} is not among the variants {sorted(study.variants)}")
        return study


def options(values: dict[str, str]) -> list[str]:
    """{'model.net.window': 512} → ['--model.net.window', '512']."""
    flat: list[str] = []
    for name, value in values.items():
        flat += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flat


def run_one(study: Study, variant: str, seed: int, folder: Path, extra: list[str], device: str | None) -> Path:
    """Trains one variant with one seed on one device; returns its summary. Raises RuntimeError with the log's end."""
    run_dir = folder / f"{variant}-{seed}"
    summary = run_dir / "summary.json"
    if summary.is_file():
        return summary
    command = [sys.executable, "-m", "hymba_lightning", "fit"]
    for config in study.config:
        command += ["--config", config]
    command += [*options(study.common), *options(study.variants[variant]), "--seed_everything", str(seed),
                "--run_dir", str(run_dir), "--overwrite", "true", *extra]
    environment = dict(os.environ) | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(run_dir / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code or not summary.is_file():
        tail = "\n".join((run_dir / "log.txt").read_text().splitlines()[-15:])
        raise RuntimeError(f"{variant} with seed {seed} ended with code {code}:\n{tail}")
    seconds = time.monotonic() - started
    print(f"{variant} seed {seed}: {_bpb(summary, study.stage):.4f} bpb in {seconds:.0f} s", flush=True)
    return summary


def run_study(study: Study, seeds: list[int], folder: Path, extra: list[str], devices: list[str | None],
              only: list[str] | None = None) -> str:
    """Runs everything, seed by seed (so that pairs are complete early), one run per device at a time.

    Returns the table (Markdown); also written to folder/table.md, with plot.png beside it.
    """
    names = [name for name in study.variants if only is None or name in only or name == study.baseline]
    free: Queue[str | None] = Queue()
    for device in devices:
        free.put(device)

    def job(pair: tuple[int, str]) -> None:
        device = free.get()
        try:
            run_one(study, pair[1], pair[0], folder, extra, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(job, [(seed, name) for seed in seeds for name in names]))
    return report(study, folder, seeds, names)


def _bpb(summary: Path, stage: str) -> float:
    return json.loads(summary.read_text())["bpb"][stage]


def report(study: Study, folder: Path, seeds: list[int], names: list[str]) -> str:
    """The table: bits per byte mean ± std over seeds, and the paired difference to the baseline with its own std."""
    scores = {name: [_bpb(folder / f"{name}-{seed}" / "summary.json", study.stage) for seed in seeds]
              for name in names}
    rows = ["| variant | bpb | difference to " + study.baseline + " (paired, thousandths) | n |", "|---|---|---|---|"]
    differences = {}
    for name, values in scores.items():
        delta = [1000 * (a - b) for a, b in zip(values, scores[study.baseline], strict=True)]
        spread = statistics.stdev(delta) if len(delta) > 1 else math.nan
        differences[name] = (statistics.mean(delta), spread / math.sqrt(len(delta)))
        std = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        change = "–" if name == study.baseline else f"{statistics.mean(delta):+.1f} ± {spread:.1f}"
        rows.append(f"| {name} | {statistics.mean(values):.4f}{std} | {change} | {len(values)} |")
    table = "\n".join(rows) + "\n"
    write_atomic(folder / "table.md", table)
    plot(differences, study.baseline, folder / "plot.png")
    return table


def plot(differences: dict[str, tuple[float, float]], baseline: str, path: Path) -> None:
    """Paired differences to the baseline with their standard errors; left of zero is better."""
    names = [name for name in differences if name != baseline][::-1]
    figure = Figure(figsize=(7.5, 1.4 + 0.36 * len(names)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0, color="#9aa3ad", linewidth=1)
    axis.errorbar([differences[n][0] for n in names], range(len(names)), xerr=[differences[n][1] for n in names],
                  fmt="o", color="#2563a8", capsize=3)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(f"bits per byte against {baseline}, thousandths (mean and standard error over paired seeds)",
                    fontsize=9)
    figure.savefig(path)
