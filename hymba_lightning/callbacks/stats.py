"""What a training run reports: losses, rates, clock and memory, to the logger and into the run's history."""

import resource
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from hymba_lightning.data.sequences import targets_of
from hymba_lightning.evaluation.score import sum_over_ranks, world
from hymba_lightning.model.costs import train_flops_per_token
from hymba_lightning.run.history import TrainRow
from hymba_lightning.run.run import Run, require_clock
from hymba_lightning.trainer_internals import is_ending

# Dense bfloat16 peak in TFLOP/s by the vendors' datasheets, looked up by a part of the device's name.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
    "RTX 4090": 165.0,
}


def device_peak_tflops(device: torch.device) -> float | None:
    """Peak of a known GPU, None for anything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Kilobytes, except on macOS, which reports bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class TrainingStats(pl.Callback):
    """Logs the training loss (mean over the interval and the ranks), learning rates, momentum, clock, speed and memory.

    TensorBoard shows the groups of names in alphabetical order: what matters less than train/ and val/ is named so that
    it stands below them. Counts the tokens that finished optimizer steps were made of, and keeps the run's history in
    checkpoints.

    Args:
        every_n_steps: optimizer steps between two log lines; each costs one small reduction and a wait for the GPU.
        peak_tflops: what one device could do, in TFLOP/s of the compute dtype, for the MFU; looked up by the GPU's name
            when null, and left out where it is unknown.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"model.log_every_n_steps is {every_n_steps}; it must be 1 or more")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self._run: Run | None = None
        self._last: tuple[int, float] | None = None
        self._seen_step = 0
        self._n_losses = 0
        """Of micro-batches, before the one at hand."""
        self._tokens = 0
        """Tokens of this rank's micro-batches since the last optimizer step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._run = Run.of(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak_tflops = self.peak_tflops or device_peak_tflops(pl_module.device)
        self._last, self._tokens = None, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        run, step = Run.of(trainer), trainer.global_step
        self._tokens += run.batch_tokens
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if run.losses.count == self._n_losses and loss is not None:
            # A subclass with a training step of its own. Lightning has divided its loss.
            run.losses.add(loss * trainer.accumulate_grad_batches)
        if step == self._seen_step:
            return
        self._seen_step = step
        # Every rank's micro-batches are of one size.
        run.history.tokens += self._tokens * world()[1]
        self._tokens = 0
        if step > 1 and step % self.every_n_steps and not is_ending(trainer):
            return
        mean = run.losses.take()
        if mean is None:
            return
        loss = float(sum_over_ranks(mean)) / world()[1]
        seconds, tokens = require_clock(run).elapsed(), run.history.tokens
        rate = 0.0
        if self._last is not None and seconds > self._last[1]:
            rate = (tokens - self._last[0]) / (seconds - self._last[1])
        self._last = (tokens, seconds)
        run.history.train.append(TrainRow(step, seconds, tokens, loss, run.lr_scale, rate))
        values: dict[str, float] = {
            "train/loss": loss,
            "wall_clock/train_seconds": seconds,
            "weights_lr/scale": run.lr_scale,
        }
        for index, group in enumerate(trainer.optimizers[0].param_groups):
            values[f"weights_lr/{group.get('name', index)}"] = group["lr"]
            if "name" in group and group.get("momentum"):
                values["weights_lr/muon_momentum"] = group["momentum"]
        if rate:
            values["wall_clock/tokens_per_s"] = rate
            if self.peak_tflops:
                flops = rate * train_flops_per_token(run.net, run.batch_seq_len)
                values["wall_clock/mfu"] = flops / (self.peak_tflops * 1e12 * world()[1])
        values["wall_clock/peak_memory_gb"] = peak_memory_gb(pl_module.device)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        run, targets = Run.of(trainer), targets_of(batch)
        run.phases.begin("training")
        self._n_losses = run.losses.count
        # A batch of another form is counted by the module, once it is one.
        run.batch_tokens = 0 if targets is None else targets.numel()
        run.batch_seq_len = run.batch_seq_len if targets is None else targets.size(1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            Run.of(trainer).phases.enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # While it validates, a fitting trainer is not `training`.
        run = Run.of(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            run.phases.leave()
        fitting = fitting and not trainer.sanity_checking
        if fitting and run.validation is not None and run.validation.step == trainer.global_step:
            run.note_validation(trainer, run.validation.score)

    def state_dict(self) -> dict[str, Any]:
        if self._run is None:
            return {}
        return self._run.history.state_dict() | {"phases": self._run.phases.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.history.load_state_dict(state_dict)
            self._run.phases.add(state_dict.get("phases", {}))
