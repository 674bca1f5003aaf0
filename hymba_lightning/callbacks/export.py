"""After training: weights → artifact on disk → reloaded → scored, each stage's bits per byte by itself."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from hymba_lightning import __version__
from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.stats import TrainingStats
from hymba_lightning.evaluation.score import Score, score_batches, sum_over_ranks
from hymba_lightning.files import write_atomic
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import (
    ArtifactReport,
    check_limit,
    evaluation_code_bytes,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.calibration import Calibration, calibrate
from hymba_lightning.quantization.config import QuantizationConfig

log = logging.getLogger("hymba_lightning")


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's folder on every rank: the logger's, else the trainer's root."""
    return Path(trainer.strategy.broadcast(str(trainer.log_dir or trainer.default_root_dir)))


def share_with_nodes(trainer: pl.Trainer, path: Path) -> None:
    """Puts rank 0's file on every node whose disk does not have it yet; rank 0 decides what is in it."""
    if trainer.num_nodes == 1:
        return
    content = trainer.strategy.broadcast(path.read_bytes() if trainer.is_global_zero else b"")
    if trainer.local_rank == 0 and not (path.is_file() and path.read_bytes() == content):
        write_atomic(path, content)
    trainer.strategy.barrier()


class ExportArtifact(pl.Callback):
    """Quantizes the averaged weights, writes one file, reloads it and scores what was reloaded.

    Runs after training, after the average's last swap and outside the budget (see HymbaModule.on_train_end). Scores
    the raw last-step weights, the averaged weights and the reloaded artifact on the validation stream.

    Args:
        enabled: Write an artifact at the end of training; otherwise only the weights are scored.
        filename: The artifact's name in the run's folder, or an absolute path.
        quantization: How the weights are stored, and the limit in bytes.
        calibration_batches: Training batches, over all ranks, on which GPTQ measures the layers' inputs
            (and 'mixed' what each weight matters).
            The seconds this takes count as training time: hold them back with model.reserve_seconds.
        score_stages: Score raw, averaged and reloaded weights; each takes one pass over the validation stream.
    """

    def __init__(self, enabled: bool = True, filename: str = "artifact.hymba",
                 quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 - frozen
                 calibration_batches: int = 16, score_stages: bool = True) -> None:
        if calibration_batches < 1:
            raise ValueError(f"export.calibration_batches is {calibration_batches}; it must be at least 1")
        self.enabled = enabled
        self.calibration_batches = calibration_batches
        self.filename = filename
        self.quantization = quantization
        self.score_stages = score_stages
        self.stages: dict[str, Score] = {}
        self.report: ArtifactReport | None = None
        self.code_bytes = 0
        self.path: Path | None = None
        self.on_stage: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On a GPU, calibrates once before the clock starts: what that compiles would not fit into the reserve."""
        wanted = self.enabled and self.quantization.calibrated and not trainer.fast_dev_run
        if wanted and pl_module.device.type == "cuda":
            self._rehearse(trainer, pl_module)

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrates on random ids, to no effect, and warns where the reserve looks too short for the real thing."""
        log.info("calibrating on random ids before the clock starts, to compile what that takes")
        data = trainer.datamodule
        ids = torch.randint(pl_module.net.config.vocab_size, (data.micro_batch_size, data.seq_len),
                            generator=torch.Generator().manual_seed(0)).to(pl_module.device)
        seconds = 0.0
        for _ in range(2):  # the second time nothing is left to compile
            started = time.monotonic()
            calibrate(pl_module.net, self.quantization, [ids])
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            seconds = time.monotonic() - started
        needed = -(-self.calibration_batches // trainer.world_size) * seconds
        if pl_module.budget_seconds is not None and needed > pl_module.reserve_seconds:
            log.warning("calibration will take about %.1f s, and model.reserve_seconds holds back %.1f s of the "
                        "budget: raise it, or lower export.calibration_batches",
                        needed, pl_module.reserve_seconds)

    def after_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """
        Raises:
            OSError: the artifact cannot be written; an older one at its path is untouched.
            ValueError: a tensor that cannot be stored, such as one with NaN.
        """
        if trainer.fast_dev_run:
            return
        if pl_module.clock.stop_code:
            log.info("no export: a signal ended the run; go on with --ckpt_path last")
            return
        self.path = run_folder(trainer) / self.filename
        if self.score_stages:
            ema = next(callback for callback in trainer.callbacks if isinstance(callback, WeightAverage))
            last = "ema" if ema.has_average else "raw"
            if ema.has_average:
                with ema.raw_weights(pl_module):
                    self._score("raw", trainer, pl_module.net)
            if pl_module.validated_at_step == trainer.global_step:
                self.stages[last] = pl_module.last_validation  # the last validation scored these very weights
            else:
                self._score(last, trainer, pl_module.net)
                stats = next(callback for callback in trainer.callbacks if isinstance(callback, TrainingStats))
                stats.record_validation(trainer, pl_module, self.stages[last])
        if not self.enabled:
            return
        calibration = self._calibrate(trainer, pl_module) if self.quantization.calibrated else None
        self._announce("quantizing and compressing")
        # Only rank 0 writes; its outcome, good or bad, is everyone's, so that no rank waits for a dead one.
        outcome: Any = None
        if trainer.is_global_zero:
            try:
                outcome = self._write(trainer, pl_module, calibration)
            except (OSError, ValueError) as error:
                outcome = error
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        self.report, self.code_bytes = outcome
        share_with_nodes(trainer, self.path)
        if self.score_stages:
            artifact = load_artifact(self.path)
            net = Hymba(HymbaConfig.from_dict(artifact.config), pl_module.net.runtime)
            net.load_state_dict(artifact.state_dict)
            self._score("artifact", trainer, net.to(pl_module.device))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stages.clear()

    def check(self) -> None:
        """Raises ArtifactTooLargeError when the artifact and the evaluation code are over the limit."""
        if self.report is not None:
            check_limit(self.report.bytes, self.code_bytes, self.quantization.limit_bytes, self.report)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Calibration:
        """What the averaged network does on training batches, averaged over the ranks, on the CPU."""
        self._announce("calibrating on training batches")
        share = -(-self.calibration_batches // trainer.world_size)
        with pl_module.clock.charged():
            batches = [batch.inputs.to(pl_module.device) for batch in trainer.datamodule.calibration_batches(share)]
            calibration = calibrate(pl_module.net, self.quantization, batches)
            for tensor in calibration.tensors():
                sum_over_ranks(tensor).div_(trainer.world_size)
            calibration = calibration.cpu()
        budget = pl_module.budget_seconds
        if budget is not None and pl_module.clock.elapsed() > budget:
            log.warning("calibration ended at %.1f s of a budget of %.1f s: raise model.reserve_seconds",
                        pl_module.clock.elapsed(), budget)
        return calibration

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
               calibration: Calibration | None) -> tuple[ArtifactReport, int]:
        data = trainer.datamodule
        calibration = calibration or calibrate(pl_module.net, self.quantization, []).cpu()
        weights = {name: tensor.detach().cpu() for name, tensor in pl_module.net.state_dict().items()}
        report = save_artifact(
            self.path, weights, config=pl_module.net.config.to_dict(),
            tokenizer={"sha256": data.tokenizer_fingerprint(), "vocab_size": data.vocab_size},
            metadata={"hymba_lightning": __version__, "steps": trainer.global_step, "seq_len": data.seq_len,
                      "train_seconds": round(pl_module.clock.elapsed(), 3)},
            scheme=self.quantization, **calibration._asdict())
        return report, evaluation_code_bytes()

    def _score(self, stage: str, trainer: pl.Trainer, net: Hymba) -> None:
        self._announce(f"scoring {stage} weights")
        device = trainer.lightning_module.device
        self.stages[stage] = score_batches(net, iter(trainer.datamodule.val_dataloader()), device)
        log.info("%s weights: %.4f bits per byte", stage, self.stages[stage].bpb)
        for logger in trainer.loggers:
            logger.log_metrics({f"export/{stage}_bpb": self.stages[stage].bpb}, step=trainer.global_step)

    def _announce(self, text: str) -> None:
        if self.on_stage is not None:
            self.on_stage(text)
