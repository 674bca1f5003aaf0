"""What came out: record, summaries, plots and a table on the terminal, at the end of a fit, a validation or a test."""

import dataclasses
import json
import time
from typing import Any

import lightning.pytorch as pl

from hymba_lightning.callbacks.export import end_run, expect_end
from hymba_lightning.callbacks.owner import FolderOwner
from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.evaluation.audit import StreamAudit, describe_context
from hymba_lightning.files import write_atomic
from hymba_lightning.plots import plot_context, plot_ttt
from hymba_lightning.run.record import DataIdentity, ScoreRecord
from hymba_lightning.run.run import Run, settings_of
from hymba_lightning.run.summary import environment, print_table, score_as_dict
from hymba_lightning.run.tensorboard import FINAL, TEST, log_picture
from hymba_lightning.trainer_internals import datamodule_of


class RunSummary(FolderOwner):
    """Writes and prints what came out.

    Args:
        plots: also draw training.png, ttt.png and context.png into the run's folder.
        per_token_nats: let test write nats.npy, every scored token's nats in order, for anyone's own sums.
    """

    def __init__(self, plots: bool = True, per_token_nats: bool = False) -> None:
        self.plots = plots
        self.per_token_nats = per_token_nats

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        Run.of(trainer).plots = self.plots
        if stage == "fit":
            expect_end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        end_run(trainer, pl_module)

    # Validation --------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the score of `hymba validate` into the record, with what it was measured on."""
        run = Run.of(trainer)
        if trainer.state.fn != "validate" or not trainer.is_global_zero or run.validation is None:
            return
        score, net = run.validation.score, run.net
        data = _data(trainer)
        settings = settings_of(seq_len=data and data.seq_len, dtype=net.runtime.compute_dtype)
        record = ScoreRecord(
            "validate", score.nats, score.n_tokens, score.n_bytes, _identity(data), _weights(run), "cold", settings
        )
        run.record.add(record)
        run.record.save(run.folder_of(trainer).path)

    # Test --------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        run, keep = Run.of(trainer), self.per_token_nats and trainer.is_global_zero
        self._audit = StreamAudit(run.folder_of(trainer).path, run.net.config.bos_id, keep)
        self._weights = _weights(run) if trainer.is_global_zero else ""

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        testing = Run.of(trainer).testing
        if testing is None or testing.chunk is None:
            return
        total, self._n_chunks = testing.total(), batch.n_chunks
        self._audit.add(batch, testing.chunk)
        if not testing.chunk.score.n_tokens:
            return
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{TEST}running_bpb": total.bpb, f"{TEST}chunk_bpb": testing.scores[-1].bpb}, step=total.n_tokens
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = Run.of(trainer)
        folder, testing = run.folder_of(trainer), run.testing
        if not trainer.is_global_zero or testing is None or not testing.scores:
            return
        total, config = testing.total(), testing.ttt.config
        data = _data(trainer)
        seq_len, chunk_tokens = testing.ttt.seq_len, data.ttt_chunk_tokens if data else testing.scores[0].n_tokens
        settings = {
            "seq_len": seq_len,
            "chunk_tokens": chunk_tokens,
            "ttt": dataclasses.asdict(config),
            "dtype": run.net.runtime.compute_dtype,
            "world_size": trainer.world_size,
            "epochs_done": testing.ttt.epochs_done,
        }
        score = ScoreRecord(
            "ttt",
            total.nats,
            total.n_tokens,
            total.n_bytes,
            _identity(data),
            self._weights,
            config.mode,
            settings,
            time.monotonic() - run.started,
            testing.n_chunks == self._n_chunks,
        )
        plain = run.record.without_adaptation(score)
        run.record.add(score)
        identity = {key: value for key, value in score_as_dict(score).items() if key not in ("bpb", "loss")}
        summary = {
            "weights": run.weights_from and _shown(run.weights_from, folder.path),
            "mode": config.mode,
            "context": describe_context(config, seq_len, trainer.world_size),
            "ttt_bpb": total.bpb,
            "ttt_loss": total.loss,
            "nats": total.nats,
            **identity,
            "bpb_without_adaptation": plain and plain.bpb,
            "mode_without_adaptation": plain and plain.mode,
            "chunks": testing.n_chunks,
            "seconds": score.seconds,
            **testing.ttt.clock.summary(),
            "limit_seconds": config.limit_seconds,
            "epochs_done": testing.ttt.epochs_done,
            "seq_len": seq_len,
            "chunk_tokens": chunk_tokens,
            "ttt": dataclasses.asdict(config),
            "chunk_bpb": [score.bpb for score in testing.scores],
            "chunk_bytes": [score.n_bytes for score in testing.scores],
            **self._audit.finish(),
            "environment": environment(trainer),
        }
        write_atomic(folder / "test_summary.json", json.dumps(summary, indent=2) + "\n")
        run.record.save(folder.path)
        if self.plots:
            plot_ttt(testing.scores, chunk_tokens, folder / "ttt.png", None if plain is None else plain.bpb)
            context = plot_context(
                self._audit.by_context.points(), self._audit.by_document.points(), folder / "context.png", config.mode
            )
            log_picture(trainer, "what_context_is_worth", context)
        steps = run.record.trained.steps if run.record.trained else 0
        for logger in trainer.loggers:
            logger.log_metrics({f"{FINAL}ttt_bpb": total.bpb}, step=steps)
        print_table("Test", summary, folder)


def _data(trainer: pl.Trainer) -> HymbaDataModule | None:
    data = datamodule_of(trainer)
    return data if isinstance(data, HymbaDataModule) else None


def _identity(data: HymbaDataModule | None) -> DataIdentity | None:
    return None if data is None else DataIdentity(data.data_digest("val"), data.tokenizer_fingerprint())


def _weights(run: Run) -> str:
    """SHA-256 of the file whose weights are used as they are, or of the weights where there is no such file."""
    return file_sha256(run.weights_from) if run.weights_from else weights_sha256(run.net.state_dict())


def _shown(path: Any, folder: Any) -> str:
    """A path as others may see it: relative to the run's folder where it lies inside, else its name."""
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder)) if folder in path.parents else path.name
