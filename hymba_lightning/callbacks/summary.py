"""The end of a run: summary.json and history.json, or test_summary.json, the plots, and a table on the terminal."""

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from hymba_lightning import __version__
from hymba_lightning.callbacks.export import ExportArtifact, run_folder
from hymba_lightning.callbacks.stats import TrainingStats
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.evaluation.audit import StreamAudit, describe_context
from hymba_lightning.files import write_atomic
from hymba_lightning.plots import plot_context, plot_training, plot_ttt
from hymba_lightning.text import printable


def environment(trainer: pl.Trainer) -> dict[str, Any]:
    """What a number was measured on."""
    device = trainer.lightning_module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"hymba_lightning": __version__, "torch": torch.__version__, "lightning": pl.__version__,
            "python": platform.python_version(), "device": name, "world_size": trainer.world_size,
            "threads": torch.get_num_threads()}


class RunSummary(pl.Callback):
    """Writes and prints what came out. Put it after the export, whose figures it reads.

    Args:
        plots: also draw training.png, ttt.png and context.png into the run's folder.
        per_token_nats: let test write nats.npy, every scored token's nats in order, for anyone's own sums.
    """

    def __init__(self, plots: bool = True, per_token_nats: bool = False) -> None:
        self.plots = plots
        self.per_token_nats = per_token_nats
        self._test_started = 0.0

    def after_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """
        Raises:
            ArtifactTooLargeError: the artifact and its evaluation code are over the limit; all is written before.
        """
        folder = run_folder(trainer)
        if trainer.fast_dev_run:
            return
        export = next((c for c in trainer.callbacks if isinstance(c, ExportArtifact)), None)
        if trainer.is_global_zero:
            self._write_fit(trainer, pl_module, export, folder)
        if export:
            export.check()

    def _write_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, export: ExportArtifact | None,
                   folder: Path) -> None:
        stats = next(c for c in trainer.callbacks if isinstance(c, TrainingStats))
        unigram = getattr(trainer.datamodule, "unigram_bpb", None)
        stages = export.stages if export else {}
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            "train_seconds": pl_module.clock.elapsed(),
            "budget_seconds": pl_module.budget_seconds,
            "tokens": trainer.global_step * pl_module.tokens_per_step,
            "tokens_per_s": stats.mean_tokens_per_s(pl_module.tokens_per_step),
            "parameters": sum(p.numel() for p in pl_module.net.parameters()),
            "unigram_bpb": unigram,
            "bpb": {name: score.bpb for name, score in stages.items()},
            "loss": {name: score.loss for name, score in stages.items()},
            "scored_tokens": next(iter(stages.values())).n_tokens if stages else None,
            "scored_bytes": next(iter(stages.values())).n_bytes if stages else None,
        }
        if export and export.report:
            summary |= {"artifact": str(export.path), "artifact_bytes": export.report.bytes,
                        "code_bytes": export.code_bytes, "limit_bytes": export.quantization.limit_bytes}
        summary["environment"] = environment(trainer)
        write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        history = {"train": [dataclasses.asdict(row) for row in stats.train_rows],
                   "val": [dataclasses.asdict(row) for row in stats.val_rows]}
        write_atomic(folder / "history.json", json.dumps(history) + "\n")
        if self.plots and stats.train_rows:
            plot_training(stats.train_rows, stats.val_rows, stages, folder / "training.png", unigram)
        print_table("Training", summary, folder)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._test_started = time.monotonic()
        keep = self.per_token_nats and trainer.is_global_zero
        self._audit = StreamAudit(run_folder(trainer), pl_module.net.config.bos_id, keep)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                          batch_idx: int, dataloader_idx: int = 0) -> None:
        total = pl_module.test_score()
        self._audit.add(batch, pl_module.tested_chunk)
        for logger in trainer.loggers:
            logger.log_metrics({"ttt/running_bpb": total.bpb, "ttt/chunk_bpb": pl_module.test_scores[-1].bpb},
                               step=total.n_tokens)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or not pl_module.test_scores:
            return
        total = pl_module.test_score()
        plain = _plain_bpb(folder, total.n_tokens)
        weights = getattr(pl_module, "weights_from", None)
        config, seq_len = pl_module.ttt_config, trainer.datamodule.seq_len
        summary = {
            "weights": weights, "weights_sha256": file_sha256(weights) if weights else None, "mode": config.mode,
            "context": describe_context(config, seq_len, trainer.world_size),
            "ttt_bpb": total.bpb, "ttt_loss": total.loss, "nats": total.nats, "tokens": total.n_tokens,
            "bytes": total.n_bytes, "bpb_without_adaptation": plain, "chunks": len(pl_module.test_scores),
            "seconds": time.monotonic() - self._test_started, "limit_seconds": config.limit_seconds,
            "epochs_done": pl_module.ttt.epochs_done, "seq_len": seq_len,
            "chunk_tokens": trainer.datamodule.ttt_chunk_tokens, "ttt": dataclasses.asdict(config),
            "chunk_bpb": [score.bpb for score in pl_module.test_scores],
            "chunk_bytes": [score.n_bytes for score in pl_module.test_scores], **self._audit.finish(),
            "environment": environment(trainer),
        }
        write_atomic(folder / "test_summary.json", json.dumps(summary, indent=2) + "\n")
        if self.plots:
            plot_ttt(pl_module.test_scores, pl_module.test_scores[0].n_tokens, folder / "ttt.png", plain)
            plot_context(self._audit.by_context.points(), self._audit.by_document.points(), folder / "context.png",
                         config.mode)
        for logger in trainer.loggers:
            for name, curve in (("bpb", self._audit.by_context), ("document_bpb", self._audit.by_document)):
                for point in curve.points():
                    logger.log_metrics({f"context/{name}": point.bpb}, step=point.at_least)
        print_table("Test", summary, folder)


def _plain_bpb(folder: Path, n_tokens: int) -> float | None:
    """The artifact's score without adaptation from the fit in the same folder, if it scored the same tokens."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    fit = json.loads(path.read_text())
    return fit.get("bpb", {}).get("artifact") if fit.get("scored_tokens") == n_tokens else None


def print_table(title: str, summary: dict[str, Any], folder: Path) -> None:
    """The closing table: a row per figure that the summary holds."""
    table = Table(title=f"{title}: {printable(str(folder))}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(label: str, value: Any, form: str = "") -> None:
        if value is not None:
            table.add_row(printable(label), printable(f"{value:{form}}"))

    row("unigram model of the same tokenizer, bpb", summary.get("unigram_bpb"), ".4f")
    names = {"raw": "raw last-step weights, bpb", "ema": "averaged weights, bpb", "artifact": "reloaded artifact, bpb"}
    for stage, bpb in summary.get("bpb", {}).items():
        row(names.get(stage, stage), bpb, ".4f")
    row("without adaptation, bpb", summary.get("bpb_without_adaptation"), ".4f")
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
    row("tokens per second", summary.get("tokens_per_s"), ",.0f")
    row("tokens scored", summary.get("scored_tokens") or summary.get("tokens"), ",")
    row("test seconds", summary.get("seconds"), ".1f")
    # Names are text, not markup.
    Console(markup=False, emoji=False).print(table)
