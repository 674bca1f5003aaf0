"""The LightningModule: the network with its optimizer, schedule, averaging, validation and test-time training."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from hymba_lightning.callbacks.average import AverageKind, WeightAverage
from hymba_lightning.callbacks.checkpoint_io import use_digests
from hymba_lightning.callbacks.compile_warmup import CompileWarmup
from hymba_lightning.callbacks.loss_guard import LossGuard
from hymba_lightning.callbacks.rank_watch import RankWatch
from hymba_lightning.callbacks.stats import TrainingStats
from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.checkpoints import TOKENIZER_KEY, check_tokenizer
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.sequences import AnyBatch, as_batch, known_ids
from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation.score import Score
from hymba_lightning.evaluation.ttt import ScoreFirstTTT, TTTConfig
from hymba_lightning.field_types import settled
from hymba_lightning.metrics import BitsPerByte
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.gradients import Gradients
from hymba_lightning.ops.compiling import compiled
from hymba_lightning.run.run import ClockReading, Run, Testing, Validation
from hymba_lightning.run.tensorboard import TEST
from hymba_lightning.trainer_internals import (
    datamodule_of,
    gradient_sync_wanted,
    graph_obstacle,
    log_evaluations_by_step,
    not_yet_there,
    when_ranks_have_met,
)
from hymba_lightning.training import checks
from hymba_lightning.training.graphed import average_over_ranks, start_gradients, uses_cuda_graph
from hymba_lightning.training.optim import HymbaOptimizer, OptimizerConfig, build_optimizer
from hymba_lightning.training.pages import keep_pages

log = logging.getLogger("hymba_lightning")
# Of the options, what a run is made of and not how a machine runs it.
KEPT = ("budget_seconds", "reserve_seconds", "average", "average_window", "ema_decay", "log_every_n_steps", "on_nan")


class HymbaModule(pl.LightningModule):
    """Trains, validates and tests a Hymba network.

    A plain ``Trainer(...).fit(module, datamodule)`` has the clock, the schedule, the average and the logged
    statistics: they come from `configure_callbacks`, unless the trainer already has a callback of that kind.
    """

    @settled()
    def __init__(
        self,
        net: HymbaConfig = HymbaConfig(),  # noqa: B008 - frozen, so sharing the default is safe
        runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        ttt: TTTConfig = TTTConfig(),  # noqa: B008
        budget_seconds: float | None = None,
        reserve_seconds: float = 0.0,
        average: AverageKind = "ema",
        average_window: float = 0.03,
        ema_decay: float | None = None,
        compile: bool = False,
        compile_warmup_steps: int | None = None,
        cuda_graph: bool | None = None,
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
            budget_seconds: Training seconds the run may take in all, resumed parts included; null leaves the end to
                trainer.max_steps, trainer.max_time (validations included), or a finite loader and trainer.max_epochs.
            reserve_seconds: Part of the budget held back for the export's calibration on training data.
            average: What is validated and exported: 'ema', an exponential average of the weights; 'uniform', their mean
                over the end of the run; 'none', the trained weights.
            average_window: Length of the average as a share of the run: of the steps so far, times the learning rates'
                factor ('ema'), or of the run's end ('uniform').
            ema_decay: Decay of the exponential average per step (the reference has 0.997); null for average_window.
            compile: Compile the network with torch.compile.
            compile_warmup_steps: Steps run and undone before the clock starts, so that compilation (torch's, Triton's,
                numba's) costs no budget; null for 8 with `compile` and 2 without, 0 for none.
            cuda_graph: Record forward and backward of a micro-batch once and replay them, so that the host launches one
                graph instead of some thousand kernels; null for yes on a GPU, in a fit with `compile` only.
            log_every_n_steps: Optimizer steps between two log lines.
            peak_tflops: Peak of one device in TFLOP/s for the MFU; null looks the GPU up by name.
            on_nan: What NaN or infinity in a loss or gradient does: 'stop' ends the run, naming step, shard and offset,
                with the checkpoint before kept; 'skip' leaves that gradient out.
        """
        super().__init__()
        # load_from_checkpoint brings back what was saved: plain values.
        net = HymbaConfig.from_dict(net) if isinstance(net, dict) else net
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        runtime = RuntimeConfig.from_dict(runtime) if isinstance(runtime, dict) else runtime
        ttt = TTTConfig(**ttt) if isinstance(ttt, dict) else ttt
        self.net = Hymba(net, runtime)
        self.optimizer_config, self.ttt_config = optimizer, ttt
        self.budget_seconds, self.reserve_seconds = budget_seconds, reserve_seconds
        self.average, self.average_window, self.ema_decay = average, average_window, ema_decay
        self.compile_net = compile
        self.compile_warmup_steps = (8 if compile else 2) if compile_warmup_steps is None else compile_warmup_steps
        self.log_every_n_steps, self.peak_tflops = log_every_n_steps, peak_tflops
        self.on_nan = on_nan
        # What load_from_checkpoint brings back. Plain values only: checkpoints are read with weights_only.
        configs = {"optimizer": dataclasses.asdict(optimizer), "ttt": dataclasses.asdict(ttt)}
        self.save_hyperparameters({"net": net.to_dict(), **configs} | {name: getattr(self, name) for name in KEPT})
        self.bpb = BitsPerByte()
        self._weights_before_test: dict[str, Tensor] = {}
        # Of this module; its Trainer may run others.
        self._last_validation: Score | None = None
        self._testing: Testing | None = None
        self._lengths_told = False
        self._compiled_forward: Callable[..., Tensor] | None = None
        self.cuda_graph = cuda_graph
        self._gradients: Gradients | None = None

    # Set-up ------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        checks.check_callbacks(self.trainer)
        wanted: list[pl.Callback] = [
            CompileWarmup(self.compile_warmup_steps),
            RankWatch(),
            WallClock(self.budget_seconds, self.reserve_seconds),
            LossGuard(self.on_nan),
            WeightAverage(self.average, self.average_window, self.ema_decay),
            TrainingStats(self.log_every_n_steps, self.peak_tflops),
        ]
        missing = not_yet_there(self.trainer, wanted)
        for watch in missing:
            if isinstance(watch, RankWatch):
                when_ranks_have_met(self.trainer, watch.begin)
        return missing

    @property
    def run(self) -> Run:
        """What the parts of this module's run know of each other."""
        return Run.of(self.trainer)

    def setup(self, stage: str) -> None:
        self.run.start_stage(getattr(datamodule_of(self.trainer), "opened_in", 0.0))
        self.run.net = self.net
        self.run.schedules = [self.set_schedule]
        checks.check_options(self.trainer)
        use_digests(self.trainer)
        log_evaluations_by_step(self.trainer)
        data = datamodule_of(self.trainer)
        vocab = getattr(data, "vocab_size", None)
        bos_id = getattr(data, "bos_id", None)
        other_bos = bos_id is not None and self.net.config.reset_at_bos and bos_id != self.net.config.bos_id
        if vocab is not None and vocab != self.net.config.vocab_size:
            # Else the second would be told only after the first had been set.
            too = f" (and model.net.bos_id to {bos_id})" if other_bos else ""
            raise ValueError(
                f"the data's tokenizer has {vocab} tokens, but model.net.vocab_size is "
                f"{self.net.config.vocab_size}: set it to {vocab}{too} or use the other tokenizer"
            )
        if other_bos:
            raise ValueError(
                f"the tokenizer starts documents with id {bos_id}, but model.net.bos_id is "
                f"{self.net.config.bos_id}: set it to {bos_id}"
            )
        if stage == "fit":
            checks.check_fit(self.trainer, self.budget_seconds, measures_more=type(self) is not HymbaModule)
            if self.trainer.strategy.root_device.type == "cpu":
                keep_pages()
            if self.compile_net:
                # Only what trains: an evaluation's last sequence is shorter, and a graph for every length costs more
                # than it saves. Kept as a function, since a module here would name every weight twice.
                self._compiled_forward = compiled(self.net.forward, dynamic=False)
                # One graph under DDP too: cut at its gradient buckets, a step on two GPUs took 58.3 ms, whole 56.9.
                torch._dynamo.config.optimize_ddp = False

    def use_network(self, net: Hymba) -> None:
        """Replaces the network by another one, such as an artifact's."""
        self.net = net
        if self._trainer is not None:
            self.run.net = self.net

    def configure_optimizers(self) -> HymbaOptimizer:
        checks.check_trainable(self)
        return build_optimizer(self.net, self.optimizer_config)

    # Training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        checks.check_start(self.trainer)

    def set_schedule(self, reading: ClockReading) -> None:
        """Sets learning rates and momentum for the step about to run."""
        config = self.optimizer_config
        optimizer = self.trainer.optimizers[0]
        if not isinstance(optimizer, HymbaOptimizer):
            # One's own, with a schedule of its own: schedulers keep the rate that they began with.
            group = optimizer.param_groups[0]
            self.run.lr_scale = min(group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0), 1.0)
            return
        self.run.lr_scale = config.lr_scale(reading)
        optimizer.set_schedule(self.run.lr_scale, config.momentum(reading))
        if not self._lengths_told and reading.expected_steps is not None:
            self._lengths_told = True
            if self.trainer.is_global_zero:
                for note in config.lengths_beyond(reading.expected_steps):
                    log.warning("%s", note)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V), softcapped, of token ids (B, T) int64."""
        return self.net(ids_BT)

    def training_step(self, batch: AnyBatch, batch_idx: int) -> Tensor:
        batch = as_batch(batch, self.net.config.vocab_size)
        run = self.run
        run.batch_tokens, run.batch_seq_len = batch.targets.numel(), batch.targets.size(1)
        forward = self._compiled_forward or self.net
        if self._gradients is None and uses_cuda_graph(graph_obstacle(self.trainer), self.cuda_graph, self.compile_net):
            self._gradients = start_gradients(self.trainer.optimizers, forward, list(self.net.parameters()))
        if self._gradients is None:
            loss = forward(batch.inputs, batch.targets)
        else:
            loss = self._gradients.add(batch.inputs, batch.targets, 1 / self.trainer.accumulate_grad_batches)
        if not run.warming_up:
            run.losses.add(loss)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._gradients is None:
            super().backward(loss, *args, **kwargs)
        elif gradient_sync_wanted(self.trainer):
            average_over_ranks(self._gradients.flat)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self._gradients is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_end(self) -> None:
        self._gradients = None

    # Validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.bpb.reset()

    def validation_step(self, batch: AnyBatch, batch_idx: int) -> None:
        batch = as_batch(batch, self.net.config.vocab_size)
        if not batch.inputs.numel():
            return  # a rank whose share of the sequences is one short
        nats_BT = self.net(batch.inputs, batch.targets, reduction="none")
        if batch.target_bytes.numel():
            self.bpb.update(nats_BT, batch.target_bytes)
        else:
            # A loader of token pairs does not say what text they stand for: a loss, but no bits per byte.
            self.log("val/loss", nats_BT.mean(), batch_size=nats_BT.numel(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.bpb.update_called:
            return
        bpb = float(self.bpb.compute())
        score = self.bpb.score
        assert score is not None
        self._last_validation = score
        self.run.validation = Validation(self.trainer.global_step, score)
        # The value is the same on every rank already; checkpoints and early stopping can monitor it.
        self.log_dict(
            {"val/bpb": bpb, "val/loss": score.loss},
            rank_zero_only=True,
            logger=self.trainer.state.fn != TrainerFn.FITTING,
        )  # in a fit, TrainingStats does that

    def predict_step(self, batch: AnyBatch | Tensor, batch_idx: int) -> Tensor:
        """Of token ids (B, T) the logits (B, T, V); of inputs and targets every target's nats (B, T), float32."""
        if isinstance(batch, Tensor):
            return self.net(known_ids(batch, self.net.config.vocab_size))
        batch = as_batch(batch, self.net.config.vocab_size)
        return self.net(batch.inputs, batch.targets, reduction="none")

    # Test: score first, then train on what was scored --------------------------------------------------------------

    def on_test_start(self) -> None:
        self._weights_before_test = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        data = datamodule_of(self.trainer)
        if not isinstance(data, HymbaDataModule):
            raise ValueError(
                "test-time training needs a HymbaDataModule: use trainer.validate for a loader of your own"
            )
        with torch.inference_mode(False):  # what is made here is trained
            stream, records = data.val_stream(), self.cuda_graph is not False
            self._testing = self.run.testing = Testing(
                ScoreFirstTTT(
                    self.net, data.seq_len, self.ttt_config, started=self.run.started, stream=stream, cuda_graph=records
                )
            )

    @property
    def testing(self) -> Testing:
        """The test in progress, or the last one.

        Raises:
            RuntimeError: none has started.
        """
        if self._testing is None:
            raise RuntimeError("nothing was tested yet")
        return self._testing

    def test_score(self) -> Score:
        """Sum of the scores of all chunks tested so far."""
        return self.testing.total()

    @property
    def last_validation(self) -> Score | None:
        """This module's latest validation's sums over all ranks, None before the first."""
        return self._last_validation

    def test_step(self, chunk: Chunk, batch_idx: int) -> None:
        # Lightning's inference mode would forbid the adaptation; tensors made under it cannot be trained on, so copy.
        with torch.inference_mode(False):
            chunk = chunk._replace(tokens=chunk.tokens.clone(), target_bytes=chunk.target_bytes.clone())
            self.testing.add(self.testing.ttt.score_chunk(chunk))
            self.testing.ttt.adapt_chunk(chunk)

    def on_test_epoch_end(self) -> None:
        total = self.testing.total()
        self.log_dict({f"{TEST}bpb": total.bpb, f"{TEST}loss": total.loss}, rank_zero_only=True)

    def put_back_weights(self) -> None:
        """A tested module is the one that was handed in, not the adapted one."""
        self.net.load_state_dict(self._weights_before_test, strict=False)
        self._weights_before_test = {}

    on_test_end = put_back_weights

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = datamodule_of(self.trainer)
        if isinstance(data, HymbaDataModule):
            checkpoint[TOKENIZER_KEY] = data.tokenizer_fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture or tokenizer, before any weight is touched; says which of the
        optimizer's settings go on with other values.

        Raises:
            ValueError: naming what differs.
        """
        saved = checkpoint.get("hyper_parameters", {})
        net = saved.get("net")
        if net is not None:
            own, net = self.net.config.to_dict(), net.to_dict() if isinstance(net, HymbaConfig) else net
            different = [
                f"{key}: checkpoint {value!r}, config {own.get(key)!r}"
                for key, value in net.items()
                if value != own.get(key)
            ]
            if different:
                raise ValueError(
                    "the checkpoint holds another network than the config describes ("
                    + "; ".join(different)
                    + "): use the config it was trained with"
                )
        if self._trainer is None:
            return
        self._check_tokenizer(checkpoint.get(TOKENIZER_KEY))
        if self.trainer.state.fn == TrainerFn.FITTING:
            now = dataclasses.asdict(self.optimizer_config)
            before = saved.get("optimizer") or {}
            changed = [
                f"{key} {before[key]} → {value}"
                for key, value in now.items()
                if key in before and _plain(before[key]) != _plain(value)
            ]
            if changed:
                log.info("going on with other settings of the optimizer than before: %s", ", ".join(changed))

    def _check_tokenizer(self, saved: str | None) -> None:
        data = datamodule_of(self.trainer)
        if not isinstance(data, HymbaDataModule):
            return
        if saved is None:
            log.warning(
                "the checkpoint does not say which tokenizer it was trained with: what comes out means "
                "something only with that one"
            )
        else:
            option = "--data.tokenizer or --data.data_dir"
            check_tokenizer("the checkpoint", saved, data.tokenizer_fingerprint(), data.tokenizer, option)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
