"""Tables and plot of an ablation: differences to the baseline, paired by seed, with their errors."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.files import write_atomic
from hymba_lightning.plots import panels, save_figure
from hymba_lightning.studies.runs import made_with, other_options, read_json, same_text
from hymba_lightning.studies.seeds import STAGES, mean_and_std
from hymba_lightning.studies.significance import paired_p
from hymba_lightning.studies.variants import Study, arguments_of

# What results.json keeps of a run's summary.
KEPT = (
    "steps",
    "train_seconds",
    "tokens_per_s",
    "parameters",
    "scored_tokens",
    "scored_bytes",
    "artifact_bytes",
    "code_bytes",
    "environment",
)


def scores_of(run_dir: Path) -> dict[str, float]:
    """Stage → bits per byte of a finished run."""
    stages = dict(read_json(run_dir / "summary.json", keys=["bpb"])["bpb"])
    tested = run_dir / "test_summary.json"
    return stages | ({"ttt": read_json(tested, keys=["ttt_bpb"])["ttt_bpb"]} if tested.is_file() else {})


def texts_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Stage → what a finished run says of each score: its data, tokenizer, tokens, bytes."""
    stages = read_json(run_dir / "summary.json").get("scores", {})
    tested = run_dir / "test_summary.json"
    return stages | ({"ttt": read_json(tested)} if tested.is_file() else {})


def _made_otherwise(study: Study, folder: Path, name: str, seed: int, extra: Sequence[str]) -> str:
    """How a run's options differ from the study's, "" where they do not."""
    return other_options(made_with(folder / f"{name}-{seed}", "fit"), arguments_of(study, name, seed, extra))


def _extra_options(study: Study, folder: Path, seeds: Sequence[int]) -> list[str]:
    """The options for all that the baseline's first run was made with."""
    for seed in seeds:
        made = made_with(folder / f"{study.baseline}-{seed}", "fit")
        if made is not None:
            return made[len(arguments_of(study, study.baseline, seed)) :]
    return []


def write_results(study: Study, folder: Path, extra: Sequence[str]) -> None:
    """folder/results.json: of every run of `study` in it that ended, its options, its scores and what it took. Runs
    that were made with other options than these and `extra` are left out."""
    rows = []
    for path in sorted(folder.glob("*/summary.json")):
        variant, _, seed = path.parent.name.rpartition("-")
        if (
            variant in study.variants
            and seed.isdigit()
            and not _made_otherwise(study, folder, variant, int(seed), extra)
        ):
            summary = read_json(path)
            rows.append(
                {
                    "variant": variant,
                    "seed": int(seed),
                    "options": study.common | study.variants[variant],
                    "bpb": scores_of(path.parent),
                }
                | {key: summary[key] for key in KEPT if key in summary}
            )
    write_atomic(folder / "results.json", json.dumps(rows, indent=1) + "\n")


def report(
    study: Study, folder: Path, seeds: list[int], only: list[str] | None = None, extra: Sequence[str] | None = None
) -> str:
    """The tables: the study's stage, mean ± std over seeds, with the paired difference to the baseline, its standard
    error and the p of a paired t-test; then every stage with its difference. A variant counts with the seeds that it
    and the baseline have both ended with, on the same text; a run of other options than the study has now (and `extra`,
    options for all, by default those of the baseline's first run) is left out and told. Raises FileNotFoundError where
    the baseline has none with the study's stage.
    """
    extra = _extra_options(study, folder, seeds) if extra is None else extra
    left_out: list[str] = []
    runs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in study.names(only)}
    # The baseline first: the others are compared with its runs.
    for name in sorted(runs, key=lambda name: name != study.baseline):
        for seed in seeds:
            run_dir, base_dir = folder / f"{name}-{seed}", folder / f"{study.baseline}-{seed}"
            if not (run_dir / "summary.json").is_file():
                continue
            others = _made_otherwise(study, folder, name, seed, extra)
            if others:
                left_out.append(f"{run_dir.name}, of other options ({others} is asked for now)")
                continue
            stages = scores_of(run_dir)
            if seed in runs[study.baseline]:
                texts, base_texts = texts_of(run_dir), texts_of(base_dir)
                strange = [s for s in stages if not same_text(texts.get(s, {}), base_texts.get(s, {}))]
                stages = {stage: bpb for stage, bpb in stages.items() if stage not in strange}
                left_out += [
                    f"{run_dir.name}, scored on other text than {base_dir.name} ({', '.join(strange)})"
                ] * bool(strange)
            runs[name][seed] = stages
    base = runs[study.baseline]
    if not any(study.stage in stages for stages in base.values()):
        raise FileNotFoundError(
            f"{folder} has no finished run of the baseline {study.baseline!r} with {study.stage!r} "
            f"and a seed of {seeds}" + "".join(f"; left out: {note}" for note in left_out[:3])
        )

    def column(name: str, stage: str) -> tuple[list[float], list[float]]:
        """The variant's values, and their differences to the baseline's in thousandths."""
        pairs = [
            (run[stage], base[seed][stage])
            for seed, run in runs[name].items()
            if stage in run and stage in base.get(seed, {})
        ]
        return [a for a, _ in pairs], [1000 * (a - b) for a, b in pairs]

    rows = [
        f"| variant | bpb, mean ± std | difference to {study.baseline}, paired, thousandths ± standard error | p | n |",
        "|---" * 5 + "|",
    ]
    differences = {}
    for name in runs:
        values, delta = column(name, study.stage)
        if values:
            differences[name] = (statistics.mean(delta), _standard_error(delta))
            change, p = ("–", "–") if name == study.baseline else (_difference(delta), _p(delta))
            rows.append(f"| {name} | {mean_and_std(values)} | {change} | {p} | {len(values)} |")
    known = [stage for stage in STAGES if any(stage in run for run in base.values())]
    rows += ["", "| variant | " + " | ".join(STAGES[stage] for stage in known) + " |", "|---" * (len(known) + 1) + "|"]
    for name in differences:
        cells = []
        for stage in known:
            values, delta = column(name, stage)
            change = "" if name == study.baseline or not delta else f" ({_difference(delta)})"
            cells.append(mean_and_std(values) + change if values else "–")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", *(f"left out: {note}" for note in left_out)] * bool(left_out)
    table = "\n".join(rows) + "\n"
    write_atomic(folder / "table.md", table)
    write_results(study, folder, extra)
    plot(differences, study.baseline, folder / "plot.png")
    return table


def _difference(delta: list[float]) -> str:
    """Mean ± standard error of paired differences, without the latter for a single pair."""
    error = f" ± {_standard_error(delta):.1f}" if len(delta) > 1 else ""
    return f"{statistics.mean(delta):+.1f}{error}"


def _standard_error(delta: list[float]) -> float:
    return statistics.stdev(delta) / math.sqrt(len(delta)) if len(delta) > 1 else math.nan


def _p(delta: list[float]) -> str:
    """Two-sided p of Student's paired t-test, a dash where there is none."""
    p = paired_p(delta)
    return "–" if math.isnan(p) else f"{p:.2g}"


def plot(differences: dict[str, tuple[float, float]], baseline: str, path: Path) -> None:
    """Paired differences to the baseline with their standard errors; left of zero is better."""
    names = [name for name in differences if name != baseline][::-1]
    figure, (axis,) = panels(8.5, 1.4 + 0.36 * len(names))
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
    axis.set_xlabel(
        f"bits per byte against {baseline}, thousandths\n(mean and standard error over paired seeds)", fontsize=9
    )
    save_figure(figure, path)
