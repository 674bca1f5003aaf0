"""The same number of steps and of tokens a step at several sequence lengths: milliseconds a step, bits per byte."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from hymba_lightning.files import write_atomic
from hymba_lightning.report.charts import Chart, Series, to_png
from hymba_lightning.report.runs import load_runs
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import check_same_text, hardware, run_once
from hymba_lightning.studies.variants import options


def run_lengths(lengths: Sequence[int], tokens: int, steps: int, folder: Path, arguments: Sequence[str]) -> str:
    """Fits once per length, then writes table.md and context_scaling.png; returns the table.

    Args:
        lengths: Values of data.seq_len.
        tokens: Tokens per rank and step, a multiple of every length.
        steps: Optimizer steps of each run.
        folder: Of the runs and the results. What is there already is not run again.
        arguments: Options of `hymba fit`, such as --config.

    Raises:
        ValueError: No length, or tokens that a length does not divide.
    """
    wrong = [length for length in lengths if length < 1 or tokens % length]
    if wrong or not lengths:
        raise ValueError(f"tokens={tokens} is no multiple of the sequence lengths {wrong}: choose others")
    points = []
    environment: dict = {}
    texts: dict[Path, dict] = {}
    for length in lengths:
        run_dir = folder / f"seq-{length}"
        values = {
            "data.seq_len": length,
            "data.micro_batch_size": tokens // length,
            "trainer.max_steps": steps,
            "model.budget_seconds": None,
            "export.enabled": False,
        }
        summary = run_once("fit", run_dir, "summary.json", [*arguments, *options(values)])
        environment = summary["environment"]
        texts[run_dir] = next(iter(summary.get("scores", {}).values()), {})
        check_same_text(texts)
        times = [milliseconds for _, milliseconds in load_runs([run_dir])[0].step_times()]
        mean = 1000 * summary["train_seconds"] / summary["steps"]
        points.append(
            {
                "seq_len": length,
                "ms": statistics.median(times) if times else mean,
                "ms_mean": mean,
                "bpb": summary["bpb"].get("ema", summary["bpb"].get("raw")),
                "steps": summary["steps"],
            }
        )
    table = (
        "\n".join(
            [
                f"{hardware(environment)}; {tokens:,} tokens per rank and step, {steps:,} steps, averaged weights "
                "before quantization",
                "",
                "| train seq_len | " + " | ".join(f"{point['seq_len']:,}" for point in points) + " |",
                "|---" * (len(points) + 1) + "|",
                "| ms/step, median | " + " | ".join(f"{point['ms']:.1f}" for point in points) + " |",
                "| ms/step, mean | " + " | ".join(f"{point['ms_mean']:.1f}" for point in points) + " |",
                "| val_bpb | " + " | ".join(f"{point['bpb']:.4f}" for point in points) + " |",
            ]
        )
        + "\n"
    )
    write_atomic(folder / "table.md", table)
    write_atomic(folder / "context_scaling.json", json.dumps(points, indent=1) + "\n")
    for name, title, unit in (
        ("bpb", "What training at longer context is worth", "bits per byte"),
        ("ms", "What it costs", "milliseconds a step"),
    ):
        line = Series(
            "median" if name == "ms" else "validation",
            [(float(point["seq_len"]), point[name]) for point in points],
            markers=True,
        )
        to_png(
            Chart(name, title, "tokens of context in training", unit, [line], log_x=True),
            folder / f"context_{name}.png",
        )
    return table


def main(args: list[str]) -> None:
    """`hymba study context`."""
    parser = StudyParser(
        "context",
        "Tokens and steps are the same at every length. Writes table.md, context_scaling.json and two plots. "
        "Example, on a CPU: hymba study context --out runs/context --seq_len 512 1024 2048 --tokens 4096 --steps 40 "
        "-- --config demo.yaml",
        of_fit=True,
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the runs, the table and the plots")
    parser.add_argument("--seq_len", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="Lengths")
    parser.add_argument("--tokens", type=int, default=65536, help="Tokens per rank and step, a multiple of each length")
    parser.add_argument("--steps", type=int, default=13780, help="Optimizer steps of each run")
    given = parser.read(args)
    print(run_lengths(given.seq_len, given.tokens, given.steps, Path(given.out), parser.fit_options))
