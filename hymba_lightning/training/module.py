"""The LightningModule: the network with its optimizer, schedule, averaging, validation and test-time training."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from hymba_lightning.callbacks.checkpoint_io import DigestCheckpointIO
from hymba_lightning.callbacks.compile_warmup import CompileWarmup
from hymba_lightning.callbacks.ema import EMA
from hymba_lightning.callbacks.loss_guard import LossGuard
from hymba_lightning.callbacks.rank_watch import RankWatch
from hymba_lightning.callbacks.stats import TrainingStats
from hymba_lightning.callbacks.wall_clock import ClockReading, WallClock
from hymba_lightning.data.sequences import Batch, Chunk
from hymba_lightning.evaluation.score import Score
from hymba_lightning.evaluation.ttt import ChunkScore, ScoreFirstTTT, TTTConfig
from hymba_lightning.metrics import BitsPerByte
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.training.optim import HymbaOptimizer, OptimizerConfig, build_optimizer

log = logging.getLogger("hymba_lightning")


class HymbaModule(pl.LightningModule):
    """Trains, validates and tests a Hymba network.

    A plain ``Trainer(...).fit(module, datamodule)`` has the clock, the warmdown, EMA and the logged statistics: they
    come from `configure_callbacks`, unless the trainer already has a callback of that kind.
    """

    def __init__(
        self,
        net: HymbaConfig = HymbaConfig(),  # noqa: B008 - frozen, so sharing the default is safe
        runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        ttt: TTTConfig = TTTConfig(),  # noqa: B008
        budget_seconds: float | None = None,
        reserve_seconds: float = 0.0,
        ema_decay: float | None = 0.997,
        swa_start: float | None = None,
        swa_every: int = 50,
        qat_start: float = 1.0,
        compile: bool = False,
        compile_warmup_steps: int | None = None,
        log_every_n_steps: int = 10,
        peak_tflops: float | None = None,
        on_nan: str = "stop",
    ) -> None:
        """
        Args:
            net: The network's architecture; saved in checkpoints and artifacts.
            runtime: How the network is executed: dtype, backends, recomputation.
            optimizer: Muon and Adam, their rates and the warmdown.
            ttt: Score-first test-time training, used by `test`.
            budget_seconds: Training seconds the run may take in all, resumed parts included; null stops at
                trainer.max_steps instead.
            reserve_seconds: Part of the budget held back for the export's calibration on training data.
            ema_decay: Decay of the exponential moving average of the weights, per step; null averages nothing.
            swa_start: Average the weights uniformly instead, from where the lr scale falls below this; null for EMA.
            swa_every: Optimizer steps between two weights that the uniform average takes in.
            qat_start: Fraction of training after which quantization-aware training is on (needs runtime.qat_bits).
            compile: Compile the network with torch.compile.
            compile_warmup_steps: Steps run and undone before the clock starts, so that compilation (torch's, Triton's,
                numba's) costs no budget; null for 20 with `compile` and 2 without, 0 for none.
            log_every_n_steps: Optimizer steps between two log lines.
            peak_tflops: Peak of one device in TFLOP/s for the MFU; null looks the GPU up by name.
            on_nan: What a NaN or infinite loss or gradient does: 'stop' ends the run, naming step, shard and offset,
                with the checkpoint from before kept; 'skip' leaves that gradient out and goes on.
        """
        super().__init__()
        self.net = Hymba(net, runtime)
        self.optimizer_config, self.ttt_config = optimizer, ttt
        self.budget_seconds, self.reserve_seconds = budget_seconds, reserve_seconds
        self.ema_decay, self.swa_start, self.swa_every = ema_decay, swa_start, swa_every
        self.qat_start = qat_start
        self.compile_net = compile
        self.compile_warmup_steps = (20 if compile else 2) if compile_warmup_steps is None else compile_warmup_steps
        self.log_every_n_steps, self.peak_tflops = log_every_n_steps, peak_tflops
        self.on_nan = on_nan
        # Plain values only: checkpoints are read with weights_only.
        self.save_hyperparameters({"net": net.to_dict(), "optimizer": dataclasses.asdict(optimizer),
                                   "budget_seconds": budget_seconds, "ema_decay": ema_decay})
        self.bpb = BitsPerByte()
        self.lr_scale = 1.0
        self.last_validation: Score | None = None
        self.validated_at_step: int | None = None
        self.warming_up = False
        self.weights_from: str | None = None
        self.test_scores: list[Score] = []
        self.tested_chunk: ChunkScore | None = None
        self._loss_sum: Tensor | None = None
        self._loss_count = 0
        self._compiled_forward: Callable[..., Tensor] | None = None

    # Set-up ------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        wanted: list[pl.Callback] = [
            CompileWarmup(self.compile_warmup_steps),
            RankWatch(),
            WallClock(self.budget_seconds, self.reserve_seconds),
            LossGuard(self.on_nan),
            EMA(self.ema_decay, self.swa_start, self.swa_every),
            TrainingStats(self.log_every_n_steps, self.peak_tflops),
        ]
        return [callback for callback in wanted
                if not any(isinstance(present, type(callback)) for present in self.trainer.callbacks)]

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            # Before anything is restored: checkpoints are written with a digest, and read where it is right.
            self.trainer.strategy.checkpoint_io = DigestCheckpointIO()
        data = getattr(self.trainer, "datamodule", None)
        vocab = getattr(data, "vocab_size", None)
        if vocab is not None and vocab != self.net.config.vocab_size:
            raise ValueError(f"the data's tokenizer has {vocab} tokens, but model.net.vocab_size is "
                             f"{self.net.config.vocab_size}: set it to {vocab} or use the other tokenizer")
        bos_id = getattr(data, "bos_id", None)
        if bos_id is not None and self.net.config.reset_at_bos and bos_id != self.net.config.bos_id:
            raise ValueError(f"the tokenizer starts documents with id {bos_id}, but model.net.bos_id is "
                             f"{self.net.config.bos_id}: set it to {bos_id}")
        if stage == "fit":
            if self.budget_seconds is None and self.trainer.max_steps < 0:
                raise ValueError("nothing ends this run: set model.budget_seconds or trainer.max_steps")
            if self.compile_net:
                # Only what trains: an evaluation's last sequence is shorter, and a graph for every length costs more
                # than it saves. Kept as a function, since a module here would name every weight twice.
                self._compiled_forward = torch.compile(self.net.forward, dynamic=False)
                # One graph under DDP too: cut at its gradient buckets, a step on two GPUs took 58.3 ms, whole 56.9.
                torch._dynamo.config.optimize_ddp = False

    def use_network(self, config: HymbaConfig, state_dict: dict[str, Tensor]) -> None:
        """Replaces the network by another one, such as an artifact's, executed as this module's runtime says."""
        runtime = self.net.runtime
        self.net = Hymba(config, runtime)
        self.net.load_state_dict(state_dict)

    def configure_optimizers(self) -> HymbaOptimizer:
        return build_optimizer(self.net.named_parameters(), self.optimizer_config, tied=self.net.config.tie_embeddings)

    @property
    def clock(self) -> WallClock:
        """The callback that owns the training clock."""
        return next(callback for callback in self.trainer.callbacks if isinstance(callback, WallClock))

    # Training ----------------------------------------------------------------------------------------------------

    def on_clock(self, reading: ClockReading) -> None:
        """Sets learning rates, momentum and quantization-aware training for the step about to run."""
        config = self.optimizer_config
        self.lr_scale = config.lr_scale(remaining_seconds=reading.remaining, mean_step=reading.mean_step,
                                        remaining_steps=reading.remaining_steps)
        self.trainer.optimizers[0].set_schedule(self.lr_scale, config.momentum(reading.step))
        if self.net.runtime.qat_bits:
            self.net.set_qat_strength(float(reading.progress >= self.qat_start))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = (self._compiled_forward or self.net)(batch.inputs, batch.targets)
        if not self.warming_up:
            self._loss_sum = loss.detach() if self._loss_sum is None else self._loss_sum + loss.detach()
            self._loss_count += 1
        return loss

    def take_mean_loss(self) -> Tensor | None:
        """This rank's mean loss (0-dim, nats per token) since the last call; None if there was no step."""
        if self._loss_sum is None:
            return None
        mean = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = None, 0
        return mean

    def on_train_end(self) -> None:
        """Averaged weights are in place and the network is still on its device: the time to score and export it.

        Callbacks with an `after_training` method run here, in order. Lightning's own `on_fit_end` is too late: the
        network has been moved to the CPU by then.
        """
        if self.net.runtime.qat_bits:
            self.net.set_qat_strength(0.0)
        for callback in self.trainer.callbacks:
            if hasattr(callback, "after_training"):
                callback.after_training(self.trainer, self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks and accumulated batches."""
        data = self.trainer.datamodule
        return data.micro_batch_size * data.seq_len * self.trainer.accumulate_grad_batches * self.trainer.world_size

    # Validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.bpb.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not batch.inputs.numel():
            return  # a rank whose share of the sequences is one short
        nats_BT = self.net(batch.inputs, batch.targets, reduction="none")
        self.bpb.update(nats_BT, batch.target_bytes)

    def on_validation_epoch_end(self) -> None:
        bpb = float(self.bpb.compute())
        self.last_validation = self.bpb.score
        self.validated_at_step = self.trainer.global_step
        # The value is the same on every rank already; checkpoints and early stopping can monitor it.
        self.log_dict({"val/bpb": bpb, "val/loss": self.last_validation.loss}, rank_zero_only=True,
                      logger=self.trainer.state.fn != TrainerFn.FITTING)  # in a fit, TrainingStats does that

    # Test: score first, then train on what was scored --------------------------------------------------------------

    def on_test_start(self) -> None:
        self._weights_before_test = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        with torch.inference_mode(False):  # what is made here is trained
            self.ttt = ScoreFirstTTT(self.net, self.trainer.datamodule.seq_len, self.ttt_config,
                                     stream=self.trainer.datamodule.val_stream())
        self.test_scores = []

    def test_step(self, chunk: Chunk, batch_idx: int) -> None:
        # Lightning's inference mode would forbid the adaptation; tensors made under it cannot be trained on, so copy.
        with torch.inference_mode(False):
            chunk = chunk._replace(tokens=chunk.tokens.clone(), target_bytes=chunk.target_bytes.clone())
            # One chunk's nats at a time: the stream may be longer than memory.
            self.tested_chunk = self.ttt.score_chunk(chunk)
            self.test_scores.append(self.tested_chunk.score)
            self.ttt.adapt_chunk(chunk)

    def test_score(self) -> Score:
        """Sum of the scores of all chunks tested so far."""
        total = self.test_scores[0]
        for score in self.test_scores[1:]:
            total = total + score
        return total

    def on_test_epoch_end(self) -> None:
        total = self.test_score()
        self.log_dict({"ttt/bpb": total.bpb, "ttt/loss": total.loss}, rank_zero_only=True)

    def on_test_end(self) -> None:
        """Puts the weights back: a tested module is the one that was handed in, not the adapted one."""
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(self._weights_before_test[name])
        del self._weights_before_test

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture with the fields that differ, before any weight is touched."""
        saved = checkpoint.get("hyper_parameters", {}).get("net")
        if saved is None:
            return
        own = self.net.config.to_dict()
        different = [f"{key}: checkpoint {saved[key]!r}, config {own.get(key)!r}" for key in saved
                     if saved[key] != own.get(key)]
        if different:
            raise ValueError("the checkpoint holds another network than the config describes (" + "; ".join(different)
                             + "): use the config it was trained with")
