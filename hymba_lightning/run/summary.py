"""summary.json, test_summary.json, history.json, the plots and the closing table: what a person sees of the record."""

from __future__ import annotations

import json
import platform
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from hymba_lightning import __version__
from hymba_lightning.files import write_atomic
from hymba_lightning.plots import plot_training
from hymba_lightning.run.folder import RunFolder
from hymba_lightning.run.record import ScoreRecord
from hymba_lightning.run.run import Run
from hymba_lightning.text import printable


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """What a number was measured on."""
    device = trainer.lightning_module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "hymba_lightning": __version__,
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "python": platform.python_version(),
        "device": name,
        "world_size": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def score_as_dict(score: ScoreRecord) -> dict[str, Any]:
    """A score with what it depends on, for a summary."""
    return {
        "bpb": score.bpb,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "mode": score.mode,
        "weights_sha256": score.weights,
        "data": None if score.data is None else score.data.digest,
        "tokenizer": None if score.data is None else score.data.tokenizer,
        "settings": score.settings,
    }


def write_fit_summary(run: Run, folder: RunFolder, unigram_bpb: float | None, plots: bool) -> dict[str, Any]:
    """Writes history.json, summary.json and training.png from the record; returns the summary."""
    record, history = run.record, run.history
    trained, stages = record.trained, record.stages()
    assert trained is not None
    phases = run.phases.seconds()
    first = next(iter(stages.values()), None)
    summary: dict[str, Any] = {
        "steps": trained.steps,
        "train_seconds": trained.seconds,
        "budget_seconds": trained.budget_seconds,
        "wall_clock_seconds": sum(phases.values()),
        "phases": phases,
        "ended_by": trained.ended_by,
        "tokens": trained.tokens,
        "tokens_per_s": trained.tokens / trained.seconds if trained.seconds else None,
        "parameters": trained.parameters,
        "unigram_bpb": unigram_bpb,
        "bpb": {stage: score.bpb for stage, score in stages.items()},
        "loss": {stage: score.loss for stage, score in stages.items()},
        "scored_tokens": first and first.tokens,
        "scored_bytes": first and first.bytes,
        "scores": {stage: score_as_dict(score) for stage, score in stages.items()},
        "train_data": trained.data and trained.data.digest,
    }
    if record.artifact:
        artifact = record.artifact
        summary |= {
            "artifact": artifact.file,
            "artifact_sha256": artifact.sha256,
            "artifact_bytes": artifact.bytes,
            "code_bytes": artifact.code_bytes,
            "limit_bytes": artifact.limit_bytes,
        }
    summary["environment"] = record.environment
    write_atomic(folder / "history.json", json.dumps(history.as_dict()) + "\n")
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if plots and history.train:
        plot_training(
            history.train,
            history.val,
            {stage: score.bpb for stage, score in stages.items()},
            folder / "training.png",
            unigram_bpb,
        )
    return summary


STAGE_NAMES = {
    "raw": "raw last-step weights, bpb",
    "ema": "averaged weights, bpb",
    "artifact": "reloaded artifact, bpb",
}


def print_table(title: str, summary: dict[str, Any], folder: RunFolder) -> None:
    """Prints the table at a run's end, with a row for each figure of the summary."""
    table = Table(title=f"{title}: {printable(str(folder))}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(label: str, value: Any, form: str = "") -> None:
        if value is not None:
            table.add_row(printable(label), printable(f"{value:{form}}"))

    row("unigram model of the same tokenizer, bpb", summary.get("unigram_bpb"), ".4f")
    for stage, bpb in summary.get("bpb", {}).items():
        row(STAGE_NAMES.get(stage, stage), bpb, ".4f")
    mode = summary.get("mode_without_adaptation")
    row(f"without adaptation, {mode}, bpb", summary.get("bpb_without_adaptation"), ".4f")
    row("evaluation mode", summary.get("mode"))
    row("score-first TTT, bpb", summary.get("ttt_bpb"), ".4f")
    if "artifact_bytes" in summary:
        used = summary["artifact_bytes"] + summary["code_bytes"]
        row("artifact bytes", summary["artifact_bytes"], ",")
        row("evaluation code bytes", summary["code_bytes"], ",")
        row("share of the limit", used / summary["limit_bytes"], ".1%")
    row("parameters", summary.get("parameters"), ",")
    row("steps", summary.get("steps"), ",")
    row("training seconds", summary.get("train_seconds"), ".2f")
    row("budget seconds", summary.get("budget_seconds"), ".0f")
    row("wall-clock seconds, start and end included", summary.get("wall_clock_seconds"), ".1f")
    row("tokens per second", summary.get("tokens_per_s"), ",.0f")
    row("tokens scored", summary.get("tokens" if "ttt_bpb" in summary else "scored_tokens"), ",")
    row("evaluation seconds", summary.get("seconds"), ".1f")
    row("tokens scored a second", summary.get("scored_tokens_per_s"), ",.0f")
    row("milliseconds of an update", summary.get("update_ms"), ".1f")
    # Names are text, not markup.
    Console(markup=False, emoji=False).print(table)
