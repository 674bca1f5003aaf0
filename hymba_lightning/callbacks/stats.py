"""What a training run reports: losses, rates, clock and memory, to the logger and into a history for the plots."""

import dataclasses
import resource
import sys
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from hymba_lightning.evaluation.score import Score, sum_over_ranks, world

# Dense bfloat16 peak in TFLOP/s by the vendors' datasheets, looked up by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0,
               "RTX 4090": 165.0}


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


@dataclass(frozen=True)
class TrainRow:
    """One line of the training history."""

    step: int
    seconds: float
    tokens: int
    loss: float
    lr_scale: float
    tokens_per_s: float


@dataclass(frozen=True)
class ValRow:
    """One validation during training."""

    step: int
    seconds: float
    tokens: int
    loss: float
    bpb: float


class TrainingStats(pl.Callback):
    """Logs the training loss (mean over the interval and the ranks), learning rates, momentum, clock, speed and memory.

    Args:
        every_n_steps: optimizer steps between two log lines; each costs one small reduction and a wait for the GPU.
        peak_tflops: what one device could do, in TFLOP/s of the compute dtype, for the MFU; looked up by the GPU's name
            when null, and left out where it is unknown.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self.train_rows: list[TrainRow] = []
        self.val_rows: list[ValRow] = []
        self._last: tuple[int, float] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak_tflops = self.peak_tflops or device_peak_tflops(pl_module.device)
        self._last = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        step = trainer.global_step
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not boundary or (step > 1 and step % self.every_n_steps and not trainer.should_stop):
            return
        loss = pl_module.take_mean_loss()
        if loss is None:
            return
        loss = float(sum_over_ranks(loss)) / world()[1]
        seconds = pl_module.clock.elapsed()
        tokens = step * pl_module.tokens_per_step
        rate = 0.0
        if self._last is not None and seconds > self._last[1]:
            rate = (step - self._last[0]) * pl_module.tokens_per_step / (seconds - self._last[1])
        self._last = (step, seconds)
        self.train_rows.append(TrainRow(step, seconds, tokens, loss, pl_module.lr_scale, rate))
        values = {"train/loss": loss, "time/train_seconds": seconds, "schedule/lr_scale": pl_module.lr_scale}
        for group in trainer.optimizers[0].param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
            if group["algorithm"] == "muon":
                values["schedule/muon_momentum"] = group["momentum"]
        if rate:
            values["perf/tokens_per_s"] = rate
            if self.peak_tflops:
                flops = rate * pl_module.net.config.train_flops_per_token(batch.inputs.size(1))
                values["perf/mfu"] = flops / (self.peak_tflops * 1e12 * world()[1])
        values["perf/peak_memory_gb"] = peak_memory_gb(pl_module.device)
        self._log(trainer, values, step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # While it validates, a fitting trainer is not `training`.
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and pl_module.last_validation is not None:
            self.record_validation(trainer, pl_module, pl_module.last_validation)

    def record_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, score: Score) -> None:
        """Takes the averaged weights' score after the present step into the history and the logs."""
        tokens = trainer.global_step * pl_module.tokens_per_step
        self.val_rows.append(ValRow(trainer.global_step, pl_module.clock.elapsed(), tokens, score.loss, score.bpb))
        self._log(trainer, {"val/loss": score.loss, "val/bpb": score.bpb}, trainer.global_step)
        # The same score once more, drawn against tokens instead of steps.
        self._log(trainer, {"val_by_tokens/bpb": score.bpb}, tokens)

    def mean_tokens_per_s(self, tokens_per_step: int) -> float | None:
        """Tokens over training seconds of the whole run, None before the first step."""
        if not self.train_rows or not self.train_rows[-1].seconds:
            return None
        last = self.train_rows[-1]
        return last.step * tokens_per_step / last.seconds

    @staticmethod
    def _log(trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"train": [dataclasses.astuple(row) for row in self.train_rows],
                "val": [dataclasses.astuple(row) for row in self.val_rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_rows = [TrainRow(*row) for row in state_dict["train"]]
        self.val_rows = [ValRow(*row) for row in state_dict["val"]]
