"""Runs `hymba fit` once per variant and seed, pairs the results by seed, and writes a table and a plot.

A run that has a summary.json is not run again, so an interrupted study goes on where it was. A run that wrote an
artifact is also tested, with score-first TTT, where the study says so.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hymba_lightning.files import write_atomic
from hymba_lightning.studies.runs import run_once
from hymba_lightning.studies.seeds import STAGES


@dataclass(frozen=True)
class Study:
    """What to compare. `common` and each variant are options of `hymba fit`, as name: value; a variant's `config` (a
    list of files) stands in for the study's."""

    config: list[str]
    baseline: str
    variants: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    stage: str = "ema"
    test: bool = False
    """Also run `hymba test` on every artifact."""

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


def options(values: dict[str, Any]) -> list[str]:
    """{'model.net.window': 512} → ['--model.net.window', '512']. A `config` is left out."""
    flat: list[str] = []
    for name, value in values.items():
        if name == "config":
            continue
        flat += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flat


def run_one(study: Study, variant: str, seed: int, folder: Path, extra: list[str], device: str | None) -> None:
    """Trains one variant with one seed on one device. Raises RuntimeError with the log's end."""
    run_dir, changes = folder / f"{variant}-{seed}", study.variants[variant]
    files = [part for config in changes.get("config", study.config) for part in ("--config", config)]
    arguments = [*files, *options(study.common), *options(changes), "--seed_everything", str(seed), *extra]
    environment = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    run_once("fit", run_dir, "summary.json", arguments, environment)
    if study.test and (run_dir / "artifact.hymba").is_file():
        run_once("test", run_dir, "test_summary.json", [*arguments, "--ckpt_path", str(run_dir / "artifact.hymba")],
                 environment)
    print(f"{variant} seed {seed}: {bits_per_byte(run_dir)[study.stage]:.4f} bpb", flush=True)


def bits_per_byte(run_dir: Path) -> dict[str, float]:
    """Stage → bits per byte of a finished run."""
    stages = dict(json.loads((run_dir / "summary.json").read_bytes())["bpb"])
    tested = run_dir / "test_summary.json"
    return stages | ({"ttt": json.loads(tested.read_bytes())["ttt_bpb"]} if tested.is_file() else {})


def run_study(study: Study, seeds: list[int], folder: Path, extra: list[str], devices: list[str | None],
              only: list[str] | None = None) -> str:
    """Runs everything, seed by seed (so that pairs are complete early), one run per device at a time.

    Returns the table (Markdown); also written to folder/table.md, with plot.png beside it. A run that fails costs no
    other one: table and plot are made of what ended, and RuntimeError then tells each failure.
    """
    names = [name for name in study.variants if only is None or name in only or name == study.baseline]
    free: Queue[str | None] = Queue()
    for device in devices:
        free.put(device)
    failures: list[str] = []

    def job(pair: tuple[int, str]) -> None:
        device = free.get()
        try:
            run_one(study, pair[1], pair[0], folder, extra, device)
        except RuntimeError as error:
            failures.append(str(error))
            print(error, flush=True)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(job, [(seed, name) for seed in seeds for name in names]))
    ended = any((folder / f"{study.baseline}-{seed}" / "summary.json").is_file() for seed in seeds)
    table = report(study, folder, seeds, names) if ended else ""
    if failures:
        head = f"{table}\n{len(failures)} runs failed; the same command tries them again:"
        raise RuntimeError("\n".join([head, *failures]))
    return table


def report(study: Study, folder: Path, seeds: list[int], names: list[str]) -> str:
    """The tables: bits per byte mean ± std over seeds with the paired difference to the baseline and its own std, then
    every stage. A variant counts with the seeds that it and the baseline have both ended with, and without any not at
    all. Raises FileNotFoundError where the baseline has none."""
    found = {name: [seed for seed in seeds if (folder / f"{name}-{seed}" / "summary.json").is_file()] for name in names}
    if not found[study.baseline]:
        raise FileNotFoundError(f"{folder} has no finished run of the baseline {study.baseline!r} with seeds {seeds}")
    paired = {name: [seed for seed in done if seed in found[study.baseline]] for name, done in found.items()}
    runs = {name: {seed: bits_per_byte(folder / f"{name}-{seed}") for seed in done}
            for name, done in paired.items() if done}
    rows = ["| variant | bpb | difference to " + study.baseline + " (paired, thousandths) | n |", "|---|---|---|---|"]
    differences = {}
    for name, by_seed in runs.items():
        values = [run[study.stage] for run in by_seed.values()]
        delta = [1000 * (run[study.stage] - runs[study.baseline][seed][study.stage]) for seed, run in by_seed.items()]
        spread = statistics.stdev(delta) if len(delta) > 1 else math.nan
        differences[name] = (statistics.mean(delta), spread / math.sqrt(len(delta)))
        change = f"{statistics.mean(delta):+.1f}" + (f" ± {spread:.1f}" if len(delta) > 1 else "")
        change = "–" if name == study.baseline else change
        rows.append(f"| {name} | {_mean(values)} | {change} | {len(values)} |")
    known = [stage for stage in STAGES if any(stage in run for by_seed in runs.values() for run in by_seed.values())]
    rows += ["", "| variant | " + " | ".join(STAGES[stage] for stage in known) + " |", "|---" * (len(known) + 1) + "|"]
    for name, by_seed in runs.items():
        ended = list(by_seed.values())
        cells = [_mean([run[stage] for run in ended]) if all(stage in run for run in ended) else "–" for stage in known]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(rows) + "\n"
    write_atomic(folder / "table.md", table)
    plot(differences, study.baseline, folder / "plot.png")
    return table


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def plot(differences: dict[str, tuple[float, float]], baseline: str, path: Path) -> None:
    """Paired differences to the baseline with their standard errors; left of zero is better."""
    names = [name for name in differences if name != baseline][::-1]
    figure = Figure(figsize=(8.5, 1.4 + 0.36 * len(names)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0, color="#9aa3ad", linewidth=1)
    axis.errorbar([differences[n][0] for n in names], range(len(names)), xerr=[differences[n][1] for n in names],
                  fmt="o", color="#2563a8", capsize=3)
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 48) for name in names], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(f"bits per byte against {baseline}, thousandths\n(mean and standard error over paired seeds)",
                    fontsize=9)
    figure.savefig(path)
