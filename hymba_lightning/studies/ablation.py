"""Runs `hymba fit` once per variant and seed, pairs the results by seed, and writes a table and a plot.

A run that has a summary.json is not run again, so an interrupted study goes on where it was. A run that wrote an
artifact is also tested, with score-first TTT, where the study says so.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hymba_lightning.files import write_atomic
from hymba_lightning.plots import save_figure
from hymba_lightning.studies.runs import artifact_of, run_once
from hymba_lightning.studies.seeds import STAGES
from hymba_lightning.studies.worker import Worker

# What results.json keeps of a run's summary.
KEPT = (
    "steps",
    "train_seconds",
    "tokens_per_s",
    "parameters",
    "scored_tokens",
    "artifact_bytes",
    "code_bytes",
    "environment",
)
# Options that a compiled graph depends on.
GRAPH_OPTIONS = ("model.net", "model.runtime", "data.seq_len", "data.micro_batch_size")
# What a variant says that is no option of `hymba fit`.
NO_OPTIONS = ("config", "seeds")


@dataclass(frozen=True)
class Study:
    """What to compare. `common` and each variant are options of `hymba fit`, as name: value; a variant's `config` (a
    list of files) stands in for the study's, and with `seeds` (a list) it is run with those among the seeds only."""

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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            study = cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is no study ({error}): it needs config, baseline, variants") from error
        if study.baseline not in study.variants:
            raise ValueError(f"{path}: baseline {study.baseline!r} is not among the variants {sorted(study.variants)}")
        if study.stage not in STAGES:
            raise ValueError(f"{path}: stage {study.stage!r} is unknown, choose from {', '.join(STAGES)}")
        return study

    def names(self, only: list[str] | None) -> list[str]:
        """The variants `only` names, all without it, and the baseline. Raises ValueError naming what is no variant."""
        unknown = [name for name in only or () if name not in self.variants]
        if unknown:
            raise ValueError(f"no such variants: {unknown}; choose from {list(self.variants)}")
        return [name for name in self.variants if only is None or name in only or name == self.baseline]


def options(values: dict[str, Any]) -> list[str]:
    """{'model.net.window': 512} → ['--model.net.window', '512']. `config` and `seeds` are left out."""
    flat: list[str] = []
    for name, value in values.items():
        if name in NO_OPTIONS:
            continue
        flat += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flat


def run_one(
    study: Study, variant: str, seed: int, folder: Path, extra: list[str], worker: Worker, lock: Path | None = None
) -> None:
    """Trains one variant with one seed, on its turn where the device has a `lock`. Raises RuntimeError with the log's
    end."""
    run_dir, changes = folder / f"{variant}-{seed}", study.variants[variant]
    files = [part for config in changes.get("config", study.config) for part in ("--config", config)]
    arguments = [*files, *options(study.common), *options(changes), "--seed_everything", str(seed), *extra]
    turn = (
        []
        if lock is None
        else [
            "--trainer.callbacks+",
            json.dumps({"class_path": "hymba_lightning.studies.turn.DeviceTurn", "init_args": {"path": str(lock)}}),
        ]
    )
    run_once("fit", run_dir, "summary.json", [*arguments, *turn], worker=worker)
    artifact = artifact_of(run_dir)
    if study.test and artifact is not None:
        run_once(
            "test",
            run_dir,
            "test_summary.json",
            [*arguments, "--ckpt_path", str(artifact)],
            worker=worker,
        )
    stages = ", ".join(f"{stage} {bpb:.4f}" for stage, bpb in bits_per_byte(run_dir).items())
    print(f"{variant} seed {seed}: {stages} bpb", flush=True)


def bits_per_byte(run_dir: Path) -> dict[str, float]:
    """Stage → bits per byte of a finished run."""
    stages = dict(json.loads((run_dir / "summary.json").read_bytes())["bpb"])
    tested = run_dir / "test_summary.json"
    return stages | ({"ttt": json.loads(tested.read_bytes())["ttt_bpb"]} if tested.is_file() else {})


class StudyQueue:
    """What is left to run, asked anew each time: seed by seed, so that pairs are complete early, and among the runs of
    a seed first those of the network that the asking process has compiled.

    `source` is a study, or the file of one, which may change meanwhile: variants added to it are run, in its order,
    those taken out are not, and a version that cannot be read leaves the last one in force.
    """

    def __init__(self, source: Study | Path, seeds: list[int], folder: Path, only: list[str] | None = None) -> None:
        self.source, self.seeds, self.folder, self.only = source, seeds, folder, only
        self.study = source if isinstance(source, Study) else Study.from_yaml(source)
        self.study.names(only)
        self._taken: set[tuple[str, int]] = set()
        self._lock = Lock()

    def graph(self, name: str) -> str:
        """What a variant's compiled graph depends on."""
        changes = self.study.variants[name]
        return json.dumps(
            [changes.get("config")]
            + [[key, value] for key, value in sorted(changes.items()) if key.startswith(GRAPH_OPTIONS)]
        )

    def take(self, compiled: str | None = None) -> tuple[str, int] | None:
        """The next variant and seed, which nobody else gets; None where nothing is left. `compiled` is the graph of the
        run before in the asking process."""
        with self._lock:
            if isinstance(self.source, Path):
                try:
                    self.study = Study.from_yaml(self.source)
                    self.study.names(self.only)
                except (OSError, ValueError, yaml.YAMLError) as error:
                    print(f"the study as it was before goes on: {error}", flush=True)
            left = [
                (name, seed)
                for seed in self.seeds
                for name in self.study.names(self.only)
                if seed in self.study.variants[name].get("seeds", self.seeds)
            ]
            left = [pair for pair in left if pair not in self._taken and not self._done(pair)]
            same = [pair for pair in left if pair[1] == left[0][1] and self.graph(pair[0]) == compiled]
            pair = next(iter([*same, *left]), None)
            if pair is not None:
                self._taken.add(pair)
            return pair

    def _done(self, pair: tuple[str, int]) -> bool:
        """Whether an earlier call of the study ended this run, its test included."""
        run_dir = self.folder / f"{pair[0]}-{pair[1]}"
        if not (run_dir / "summary.json").is_file():
            return False
        return not (self.study.test and artifact_of(run_dir)) or (run_dir / "test_summary.json").is_file()


def run_study(
    source: Study | Path,
    seeds: list[int],
    folder: Path,
    extra: list[str],
    devices: list[str | None],
    only: list[str] | None = None,
    watch: bool = False,
    per_device: int = 1,
) -> str:
    """Runs everything, `per_device` processes on each device, which train one after the other.

    Returns the table (Markdown); also written to folder/table.md, with plot.png beside it, and results.json after
    every run. A run that fails costs no other one: table and plot are made of what ended, and RuntimeError then tells
    each failure. With `watch` it waits for variants to be added to the file until folder/stop exists.
    """
    queue = StudyQueue(source, seeds, folder, only)
    failures: list[str] = []
    reporting = Lock()

    def serve(device: str | None) -> None:
        worker = Worker({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        lock = folder / f"device-{device}.lock" if per_device > 1 else None
        compiled = None
        while not (folder / "stop").exists():
            pair = queue.take(compiled)
            if pair is None and not watch:
                break
            if pair is None:
                time.sleep(1)
                continue
            compiled = queue.graph(pair[0])
            try:
                run_one(queue.study, *pair, folder, extra, worker, lock)
            except RuntimeError as error:
                failures.append(str(error))
                print(error, flush=True)
            with reporting:
                write_results(queue.study, folder)
        worker.close()

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(devices) * per_device) as pool:
        list(pool.map(serve, devices * per_device))
    study = queue.study
    ended = any((folder / f"{study.baseline}-{seed}" / "summary.json").is_file() for seed in seeds)
    table = report(study, folder, seeds, only) if ended else ""
    if failures:
        head = f"{table}\n{len(failures)} runs failed; the same command tries them again:"
        raise RuntimeError("\n".join([head, *failures]))
    return table


def write_results(study: Study, folder: Path) -> None:
    """folder/results.json: of every run of `study` in it that ended, its options, its scores and what it took."""
    rows = []
    for path in sorted(folder.glob("*/summary.json")):
        variant, _, seed = path.parent.name.rpartition("-")
        if variant in study.variants and seed.isdigit():
            summary = json.loads(path.read_bytes())
            rows.append(
                {
                    "variant": variant,
                    "seed": int(seed),
                    "options": study.common | study.variants[variant],
                    "bpb": bits_per_byte(path.parent),
                }
                | {key: summary[key] for key in KEPT if key in summary}
            )
    write_atomic(folder / "results.json", json.dumps(rows, indent=1) + "\n")


def report(study: Study, folder: Path, seeds: list[int], only: list[str] | None = None) -> str:
    """The tables: the study's stage, mean ± std over seeds, with the paired difference to the baseline and its own std;
    then every stage with its difference. A variant counts with the seeds that it and the baseline have both ended with.
    Raises FileNotFoundError where the baseline has none with the study's stage."""
    runs = {
        name: {
            seed: bits_per_byte(folder / f"{name}-{seed}")
            for seed in seeds
            if (folder / f"{name}-{seed}" / "summary.json").is_file()
        }
        for name in study.names(only)
    }
    base = runs[study.baseline]
    if not any(study.stage in stages for stages in base.values()):
        raise FileNotFoundError(
            f"{folder} has no finished run of the baseline {study.baseline!r} with {study.stage!r} "
            f"and a seed of {seeds}"
        )

    def column(name: str, stage: str) -> tuple[list[float], list[float]]:
        """The variant's values, and their differences to the baseline's in thousandths."""
        pairs = [
            (run[stage], base[seed][stage])
            for seed, run in runs[name].items()
            if stage in run and stage in base.get(seed, {})
        ]
        return [a for a, _ in pairs], [1000 * (a - b) for a, b in pairs]

    rows = ["| variant | bpb | difference to " + study.baseline + " (paired, thousandths) | n |", "|---|---|---|---|"]
    differences = {}
    for name in runs:
        values, delta = column(name, study.stage)
        if values:
            spread = statistics.stdev(delta) if len(delta) > 1 else math.nan
            differences[name] = (statistics.mean(delta), spread / math.sqrt(len(delta)))
            change = "–" if name == study.baseline else _mean(delta, "+.1f")
            rows.append(f"| {name} | {_mean(values)} | {change} | {len(values)} |")
    known = [stage for stage in STAGES if any(stage in run for run in base.values())]
    rows += ["", "| variant | " + " | ".join(STAGES[stage] for stage in known) + " |", "|---" * (len(known) + 1) + "|"]
    for name in differences:
        cells = []
        for stage in known:
            values, delta = column(name, stage)
            change = "" if name == study.baseline or not delta else f" ({_mean(delta, '+.1f')})"
            cells.append(_mean(values) + change if values else "–")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(rows) + "\n"
    write_atomic(folder / "table.md", table)
    write_results(study, folder)
    plot(differences, study.baseline, folder / "plot.png")
    return table


def _mean(values: list[float], digits: str = ".4f") -> str:
    """Mean ± std, without the latter for a single value."""
    spread = f" ± {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{spread}"


def plot(differences: dict[str, tuple[float, float]], baseline: str, path: Path) -> None:
    """Paired differences to the baseline with their standard errors; left of zero is better."""
    names = [name for name in differences if name != baseline][::-1]
    figure = Figure(figsize=(8.5, 1.4 + 0.36 * len(names)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0, color="#9aa3ad", linewidth=1)
    axis.errorbar(
        [differences[n][0] for n in names],
        range(len(names)),
        xerr=[differences[n][1] for n in names],
        fmt="o",
        color="#2563a8",
        capsize=3,
    )
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 48) for name in names], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(
        f"bits per byte against {baseline}, thousandths\n(mean and standard error over paired seeds)", fontsize=9
    )
    save_figure(figure, path)
