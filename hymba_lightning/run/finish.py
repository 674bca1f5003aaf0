"""The end of a run, top to bottom: score raw → average → calibrate → write → reload → score → summarise.

It may be called again after a kill: what is written is written whole, and a record that says `finished` ends it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from hymba_lightning import __version__
from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.evaluation.batches import score_batches
from hymba_lightning.evaluation.score import Score
from hymba_lightning.files import write_atomic
from hymba_lightning.model import Hymba
from hymba_lightning.quantization import (
    ArtifactReport,
    QuantizationConfig,
    check_limit,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.schemes import Calibration, calibrate
from hymba_lightning.run.calibration import calibrate_in_time
from hymba_lightning.run.record import ArtifactRecord, DataIdentity, ScoreRecord, Trained
from hymba_lightning.run.run import Run, require_clock, settings_of
from hymba_lightning.run.summary import environment, print_table, write_fit_summary
from hymba_lightning.run.tensorboard import FINAL, log_final_scores
from hymba_lightning.trainer_internals import datamodule_of, time_limit

log = logging.getLogger("hymba_lightning")


@dataclass(frozen=True)
class ExportSettings:
    """What is to become of the weights; see ExportArtifact for the fields."""

    enabled: bool = True
    filename: str = "artifact.hymba"
    quantization: QuantizationConfig = QuantizationConfig()  # noqa: RUF009 - frozen
    calibration_batches: int = 16
    score_stages: bool = True

    def as_dict(self) -> dict[str, Any]:
        """What the artifact depends on, as the values that JSON gives back."""
        values = {
            "quantization": dataclasses.asdict(self.quantization),
            "calibration_batches": self.calibration_batches,
        }
        return json.loads(json.dumps(values))


def finish(trainer: pl.Trainer, module: pl.LightningModule, settings: ExportSettings, plots: bool = True) -> None:
    """Scores, exports and sums up what was trained; every rank must call it. Costs no budget, but for calibration.

    Raises:
        OSError: a file cannot be written; an older one in its place is untouched.
        ValueError: a tensor that cannot be stored, such as one with NaN.
        ArtifactTooLargeError: the artifact and its evaluation code are over the limit; all is written before.
    """
    run = Run.of(trainer)
    ending = _Ending(trainer, module, settings, run)
    if ending.is_done():
        trained = run.record.trained
        stopped = trained is not None and trained.ended_by == "callback"
        # What a callback ended counts as an epoch of its own.
        epochs = trainer.current_epoch + 1
        how = f"; to train on, leave out the callback that ended it, with --trainer.max_epochs {epochs}"
        log.info("%s is finished already: nothing is left to do%s", ending.folder, how if stopped else "")
        return
    for note in run.before_finish:
        note()
    run.record.finished = False
    replaced = run.record.artifact
    ending.note_training()
    if settings.score_stages and ending.val_batches:
        if ending.has_average:
            with ending.raw_weights():
                ending.score("raw", ending.net)
        with ending.averaged_weights():
            ending.score("ema" if ending.has_average else "raw", ending.net, validated=True)
    if settings.enabled:
        with ending.averaged_weights():
            calibration = ending.calibrate()
            ending.write(calibration)
        if settings.score_stages and ending.val_batches:
            ending.score("artifact", ending.reload(), weights=ending.artifact().sha256)
    ending.remove(replaced)
    ending.summarise(plots)
    if settings.enabled:
        ending.check_limit()


class _Ending:
    """What the steps of `finish` share."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, settings: ExportSettings, run: Run) -> None:
        self.trainer, self.module, self.settings, self.run = trainer, module, settings, run
        self.net: Hymba = module.net  # type: ignore[assignment]
        self.folder = run.folder_of(trainer)
        self.path = self.folder / settings.filename
        self.clock = require_clock(run)
        self.clock.end()
        data = datamodule_of(trainer)
        self.data = data if isinstance(data, HymbaDataModule) else None
        loader = None if self.data is None else self.data.val_dataloader()
        self.val_batches = 0 if loader is None else _limit(trainer.limit_val_batches, len(loader))
        self.report: ArtifactReport | None = None
        self.scored: dict[str, Score] = {}
        self.shown = 0

    @property
    def has_average(self) -> bool:
        return self.run.average is not None and self.run.average.has_average

    def raw_weights(self) -> Any:
        return nullcontext() if self.run.average is None else self.run.average.raw_weights(self.module)

    def averaged_weights(self) -> Any:
        return nullcontext() if self.run.average is None else self.run.average.swapped(self.module)

    def artifact(self) -> ArtifactRecord:
        assert self.run.record.artifact is not None
        return self.run.record.artifact

    def is_done(self) -> bool:
        """Whether the record says so, of this very training and these settings, and the artifact still lies there."""
        record = self.run.record
        done = record.finished and record.trained is not None and record.trained.steps == self.trainer.global_step
        if done and self.settings.enabled:
            artifact = record.artifact
            done = (
                artifact is not None
                and artifact.settings == self.settings.as_dict()
                and self.path.is_file()
                and file_sha256(self.path) == artifact.sha256
            )
        if done and record.stages():
            # Another kind of average, asked for afterwards, exports other weights.
            scored = record.stages().get("ema") or record.stages().get("raw")
            with self.averaged_weights():
                done = scored is None or scored.weights == weights_sha256(self.net.state_dict())
        if done and self.settings.score_stages and self.val_batches:
            done = bool(record.stages()) and (not self.settings.enabled or "artifact" in record.stages())
        return bool(self.trainer.strategy.broadcast(done))

    def note_training(self) -> None:
        """What training came to, whatever ended it."""
        trainer, run = self.trainer, self.run
        reason = self.clock.stop_reason
        if reason is None:
            timer = time_limit(trainer)
            if trainer.global_step == trainer.max_steps:
                reason = "max_steps"
            elif timer is not None and (timer.time_remaining() or 0.0) <= 0.0:
                reason = "max_time"
            else:
                reason = "callback" if trainer.should_stop else "epochs"
        run.record.trained = Trained(
            trainer.global_step,
            run.history.tokens,
            self.clock.elapsed(),
            self.clock.budget_seconds,
            sum(p.numel() for p in self.net.parameters()),
            self.identity("train"),
            reason,
        )
        run.record.environment = environment(trainer)
        run.record.artifact = None
        run.record.scores = [score for score in run.record.scores if score.stage == "ttt"]

    def identity(self, split: str) -> DataIdentity | None:
        data = self.data
        return None if data is None else DataIdentity(data.data_digest(split), data.tokenizer_fingerprint())

    def score(self, stage: str, net: Hymba, weights: str | None = None, validated: bool = False) -> None:
        """One pass over the validation stream, unless these very weights have had theirs: in the last validation, or
        as another stage, where an average that ends with the learning rates is the last weights."""
        self.announce(f"scoring {stage} weights")
        self.run.phases.begin("scoring")
        assert self.data is not None
        started, last = time.monotonic(), self.run.validation
        weights = weights or self.trainer.strategy.broadcast(weights_sha256(net.state_dict()))
        if validated and last is not None and last.step == self.trainer.global_step:
            score = last.score
        else:
            if weights not in self.scored:
                batches: Iterator[Any] = itertools.islice(self.data.val_dataloader(), self.val_batches)
                self.scored[weights] = score_batches(net, batches, self.module.device)
            score = self.scored[weights]
            if validated:
                self.run.note_validation(self.trainer, score)
        settings = settings_of(seq_len=self.data.seq_len, dtype=net.runtime.compute_dtype)
        record = ScoreRecord(
            stage,
            score.nats,
            score.n_tokens,
            score.n_bytes,
            self.identity("val"),
            weights,
            "cold",
            settings,
            time.monotonic() - started,
        )
        self.run.record.add(record)
        log.info("%s weights: %.4f bits per byte", stage, record.bpb)
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{FINAL}{stage}_bpb": record.bpb}, step=self.trainer.global_step)

    def calibrate(self) -> Calibration:
        """What rounding has to know, the mean over all ranks' batches, on the CPU; they count as training time."""
        quantization = self.settings.quantization
        if not quantization.calibrated:
            return calibrate(self.net, quantization, []).cpu()
        if self.data is None:
            raise ValueError(
                "export.quantization.gptq needs training batches, and so a HymbaDataModule: set it to false"
            )
        self.announce("calibrating on training batches")
        self.run.phases.begin("calibration")
        world_size = self.trainer.world_size
        share = -(-self.settings.calibration_batches // world_size)
        with self.clock.charged():
            batches = (batch.inputs.to(self.module.device) for batch in self.data.calibration_batches(share))
            calibration, done = calibrate_in_time(self.net, quantization, batches, self.clock)
            calibration = calibration.cpu()
        if not self.trainer.is_global_zero:
            return calibration
        wanted = share * world_size
        if done < wanted:
            log.warning(
                "calibrated on %d of %d training batches, those that the budget left time for: raise "
                "model.reserve_seconds for more",
                done,
                wanted,
            )
        budget = self.clock.budget_seconds
        if budget is not None and self.clock.elapsed() > budget:
            log.warning(
                "calibration ended at %.2f s of a budget of %.2f s: raise model.reserve_seconds",
                self.clock.elapsed(),
                budget,
            )
        return calibration

    def write(self, calibration: Calibration) -> None:
        """Only rank 0 writes; its outcome, good or bad, is everyone's, so that no rank waits for a dead one."""
        self.announce("quantizing and compressing")
        self.run.phases.begin("export")
        outcome: Any = None
        if self.trainer.is_global_zero:
            try:
                outcome = self._save(calibration)
            except (OSError, ValueError) as error:
                outcome = error
        outcome = self.trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        self.report, self.run.record.artifact = outcome
        share_with_nodes(self.trainer, self.path)

    def _save(self, calibration: Calibration) -> tuple[ArtifactReport, ArtifactRecord]:
        weights = {name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()}
        tokenizer: dict[str, Any] = {"vocab_size": self.net.config.vocab_size}
        # Nothing that differs from one run of the same steps to the next: the record has the seconds.
        metadata: dict[str, Any] = {"hymba_lightning": __version__, "steps": self.trainer.global_step}
        if self.data is not None:
            tokenizer["sha256"] = self.data.tokenizer_fingerprint()
            metadata["seq_len"] = self.data.seq_len
        self.path.parent.mkdir(parents=True, exist_ok=True)
        code_bytes = evaluation_code_bytes(self.net.config.mixer)
        report = save_artifact(
            self.path,
            weights,
            config=self.net.config.to_dict(),
            tokenizer=tokenizer,
            metadata=metadata,
            scheme=self.settings.quantization,
            code_bytes=code_bytes,
            **calibration._asdict(),
        )
        inside = self.folder.path.resolve() in self.path.resolve().parents
        name = str(self.path.resolve().relative_to(self.folder.path.resolve()) if inside else self.path.resolve())
        return report, ArtifactRecord(
            name,
            file_sha256(self.path),
            report.bytes,
            code_bytes,
            self.settings.quantization.limit_bytes,
            self.settings.as_dict(),
        )

    def remove(self, replaced: ArtifactRecord | None) -> None:
        """Takes away the artifact of an earlier end of this run where it is no longer the run's, under its own name or
        by its content: nothing else would say that it is of other weights."""
        if replaced is None or not self.trainer.is_global_zero or Path(replaced.file).is_absolute():
            return
        path, own = self.folder / replaced.file, self.run.record.artifact
        if (own is None or own.file != replaced.file) and path.is_file() and file_sha256(path) == replaced.sha256:
            path.unlink()
            log.info("removed %s, the artifact that this run had before", path)

    def reload(self) -> Hymba:
        """The network that was written."""
        self.run.phases.begin("export")
        return load_artifact(self.path).network(self.net.runtime).to(self.module.device)

    def summarise(self, plots: bool) -> None:
        """record.json last: with it the run is finished."""
        self.announce("writing the summary")
        self.run.phases.begin("summary")
        if self.trainer.is_global_zero:
            # Calibration counts as training time too.
            assert self.run.record.trained is not None
            self.run.record.trained.seconds = self.clock.elapsed()
            summary = write_fit_summary(self.run, self.folder, getattr(self.data, "unigram_bpb", None), plots)
            self.run.record.finished = True
            self.run.record.save(self.folder.path)
            log_final_scores(self.trainer, self.module, self.run.record)
            self.run.display("finished", 1.0, 1.0)
            print_table("Training", summary, self.folder)

    def check_limit(self) -> None:
        artifact = self.artifact()
        check_limit(artifact.bytes, artifact.code_bytes, artifact.limit_bytes, self.report)

    def announce(self, text: str) -> None:
        steps = 2 + (3 if self.settings.score_stages else 0) + (2 if self.settings.enabled else 0)
        self.run.display(text, min(self.shown / steps, 0.99), 1.0)
        self.shown += 1


def _limit(limit: float | None, n_batches: int) -> int:
    """trainer.limit_val_batches as a number of batches: a share if it is a float, as Lightning reads it."""
    if limit is None:
        return n_batches
    return min(limit, n_batches) if isinstance(limit, int) else int(n_batches * limit)


def share_with_nodes(trainer: pl.Trainer, path: Path) -> None:
    """Puts rank 0's file on every node whose disk does not have it yet; rank 0 decides what is in it."""
    if trainer.num_nodes == 1:
        return
    content = trainer.strategy.broadcast(path.read_bytes() if trainer.is_global_zero else b"")
    if trainer.local_rank == 0 and not (path.is_file() and path.read_bytes() == content):
        write_atomic(path, content)
    trainer.strategy.barrier()
