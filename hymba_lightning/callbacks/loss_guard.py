"""What happens when a loss or a gradient is NaN or infinite: the run stops, or the gradient is left out."""

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from hymba_lightning.evaluation.score import world

log = logging.getLogger("hymba_lightning")

ON_NAN = ("stop", "skip")


class NonFiniteLossError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message says at which step and on which text."""


@dataclass
class _Step:
    """One optimizer step of this rank, and what the device will say about it."""

    step: int
    flags: Tensor
    """(micro-batches + 1,) bool on the host: each loss is finite; the gradient summed over the ranks is finite."""
    event: torch.cuda.Event | None
    batches: list[list[tuple[Path, int]]] = field(default_factory=list)
    """Shard and offset of every sequence, by micro-batch."""


class LossGuard(pl.Callback):
    """Looks at every step's losses and gradient without waiting for the GPU.

    The flags of a step are copied to the host behind its work and read after the next step, when the clock has waited
    for that work anyway; the end of training waits for its own. Under DDP the summed gradient, and so its flag, is the
    same on all ranks, which therefore act at the same step without a message; only the report gathers whose batch it
    was.

    Args:
        on_nan: "stop" ends the run with an error, at most one step later; last.ckpt stays the one from before (weights
            that are not finite are never saved). "skip" leaves such a gradient out: it counts as zero, on the device,
            so momentum and weight decay go on and the weights stay finite.
        most_in_a_row: with "skip", so many bad steps one after the other end the run all the same.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, on_nan: str = "stop", most_in_a_row: int = 20) -> None:
        if on_nan not in ON_NAN:
            raise ValueError(f"on_nan is {on_nan!r}; choose from {', '.join(ON_NAN)}")
        if most_in_a_row < 1:
            raise ValueError(f"most_in_a_row is {most_in_a_row}; it must be 1 or more")
        self.on_nan = on_nan
        self.most_in_a_row = most_in_a_row
        self.skipped_steps: list[int] = []
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._batches: list[list[tuple[Path, int]]] = []
        self._gradient_ok: Tensor | None = None
        self._pending: deque[_Step] = deque()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._losses, self._batches, self._gradient_ok = [], [], None
        self._pending.clear()
        self._in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        ok = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if self.on_nan == "skip":
            bad = ~ok
            for gradient in gradients:
                gradient.masked_fill_(bad, 0.0)
        self._gradient_ok = ok

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """
        Raises:
            NonFiniteLossError: the loss or the gradient of a step was not finite, and on_nan says to stop.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._losses.append(torch.isfinite(loss.detach()))
            locate = getattr(getattr(trainer, "datamodule", None), "locate_delivered_batch", None)
            self._batches.append(locate() if locate else [])
        if self._gradient_ok is None:
            return
        self._pending.append(self._flags_of(trainer.global_step, self._gradient_ok))
        ending = trainer.should_stop or trainer.global_step == trainer.max_steps
        on_gpu = self._pending[-1].event is not None
        while len(self._pending) > (1 if on_gpu and not ending else 0):
            self._judge(trainer, self._pending.popleft())

    def _flags_of(self, step: int, gradient_ok: Tensor) -> _Step:
        flags = torch.stack([*self._losses, gradient_ok])
        batches, self._losses, self._batches, self._gradient_ok = self._batches, [], [], None
        if not flags.is_cuda:
            return _Step(step, flags, None, batches)
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Step(step, host, event, batches)

    def _judge(self, trainer: pl.Trainer, step: _Step) -> None:
        if step.event is not None:
            step.event.synchronize()
        *losses, gradient = step.flags.tolist()
        if gradient:
            self._in_a_row = 0
            return
        what = _describe(step, losses)
        if self.on_nan == "skip":
            self.skipped_steps.append(step.step)
            self._in_a_row += 1
            log.warning("%s. Its gradient was left out", what)
            if self._in_a_row < self.most_in_a_row:
                return
            raise NonFiniteLossError(
                f"{self._in_a_row} steps in a row were left out; the last: {what}. Lower the "
                "learning rates, or look at the text named here"
            )
        raise NonFiniteLossError(f"{what}. {_remedy(trainer)}")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": list(self.skipped_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = list(state_dict["skipped_steps"])


def _describe(step: _Step, losses: list[bool]) -> str:
    """What was not finite and on which text, gathered from all ranks."""
    size = world()[1]
    bad = [batch for ok, batch in zip(losses, step.batches, strict=True) if not ok]
    found: list[Any] = [bad]
    everything: list[Any] = [step.batches]
    if size > 1:
        found, everything = [None] * size, [None] * size
        dist.all_gather_object(found, bad)
        dist.all_gather_object(everything, step.batches)
    if any(found):
        what = f"the loss of step {step.step} is not finite (NaN or infinite)"
    else:
        what, found = f"the gradient of step {step.step} is not finite, though its losses are", everything
    places = [
        f"{path} from token {offset:,}" + (f" (rank {owner})" if size > 1 else "")
        for owner, batches in enumerate(found)
        for batch in batches
        for path, offset in batch
    ]
    return what + (f"; its batch: {', '.join(places)}" if places else "")


def _remedy(trainer: pl.Trainer) -> str:
    kept = getattr(trainer.checkpoint_callback, "last_model_path", "")
    if kept and Path(kept).is_file():
        return (
            f"{kept} is from before: go on from it with other learning rates, or with on_nan skip to leave this "
            "batch out"
        )
    return (
        "No checkpoint was written before it (checkpoint.every_n_seconds, every_n_steps): start anew with lower "
        "learning rates, or with on_nan skip to leave this batch out"
    )
