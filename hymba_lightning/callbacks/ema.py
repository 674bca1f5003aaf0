"""Averaged weights: an exponential moving average (EMA) or a uniform one (SWA), kept beside the trained weights.

The average is what gets validated, tested and exported; the trained ("raw") weights are kept for an exact resume.
Checkpoints use the key names of Lightning's WeightAveraging: `state_dict` holds the average, `current_model_state`
the raw weights, `averaging_state` the count. Sources: Izmailov et al., arXiv:1803.05407, for the uniform average.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from hymba_lightning.run.run import Run


class EMA(Callback):
    """Keeps a float32 average of all floating-point parameters, updated after every optimizer step.

    Args:
        decay: of the exponential average, per optimizer step, started from the initial weights; null turns it off.
        swa_start: average uniformly instead, from where the learning-rate factor falls below this; null for EMA.
        swa_every: optimizer steps between two weights that the uniform average takes in.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, decay: float | None = 0.997, swa_start: float | None = None, swa_every: int = 50) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be in [0, 1), or null to turn averaging off")
        if swa_start is not None and not 0 < swa_start <= 1:
            raise ValueError(f"swa_start is {swa_start}; it must be a learning-rate factor in (0, 1], or null for EMA")
        if swa_every < 1:
            raise ValueError(f"swa_every is {swa_every}; it must be 1 or more optimizer steps")
        self.decay = decay
        self.swa_start = swa_start
        self.swa_every = swa_every
        self.n_averaged = 0
        self._last_step = 0
        self._shadow: dict[str, Tensor] = {}
        self._raw: list[Tensor] | None = None
        self._restored: dict[str, Tensor] = {}

    @property
    def enabled(self) -> bool:
        """Whether this run averages at all."""
        return self.decay is not None or self.swa_start is not None

    @property
    def has_average(self) -> bool:
        """Whether there is an average of the weights being, or just having been, trained."""
        return bool(self._shadow) and (self.swa_start is None or self.n_averaged > 0)

    @property
    def averaged_inside(self) -> bool:
        """Whether the module holds the averaged weights right now."""
        return self._raw is not None

    @contextmanager
    def swapped(self, pl_module: nn.Module) -> Iterator[None]:
        """The averaged weights are in the module inside, and whatever was there before afterwards."""
        change = self.has_average and not self.averaged_inside
        if change:
            self._swap_in(pl_module)
        try:
            yield
        finally:
            if change:
                self._swap_out(pl_module)

    @contextmanager
    def raw_weights(self, pl_module: nn.Module) -> Iterator[None]:
        """The trained weights are in the module inside, and whatever was there before afterwards."""
        change = self.averaged_inside
        if change:
            self._swap_out(pl_module)
        try:
            yield
        finally:
            if change:
                self._swap_in(pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            Run.of(trainer).average = self
            self._shadow, self._raw, self._restored = {}, None, {}
            self.n_averaged = self._last_step = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning has already put `state_dict`, the average, into the module: right to test, wrong to train on."""
        if trainer.state.fn != TrainerFn.FITTING:
            # The module now holds other weights than those averaged here.
            self._shadow, self._raw = {}, None
            return
        if "current_model_state" not in checkpoint:
            return
        self.n_averaged = int(checkpoint.get("averaging_state", {}).get("n_averaged", 0))
        self._restored = {
            name: checkpoint["state_dict"][name].detach().to(torch.float32, copy=True)
            for name, _ in self._parameters(pl_module)
        }
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights that training starts from, or from the checkpoint's average."""
        if self.enabled:
            self._shadow = {
                name: self._restored.get(name, p.detach()).to(device=p.device, dtype=torch.float32, copy=True)
                for name, p in self._parameters(pl_module)
            }
        self._restored = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step; micro-batches that only accumulate gradients leave `global_step` alone."""
        if not self._shadow or trainer.global_step <= self._last_step:
            return
        self._last_step = trainer.global_step
        if self.swa_start is None:
            weight = 1.0 - (self.decay or 0.0)
        elif self._last_step % self.swa_every == 0 and self._lr_scale(trainer) < self.swa_start:
            weight = 1.0 / (self.n_averaged + 1)
        else:
            return
        with torch.no_grad():
            current = [p.detach().float() for _, p in self._parameters(pl_module)]
            torch._foreach_lerp_(list(self._shadow.values()), current, weight)
        self.n_averaged += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.has_average and not self.averaged_inside:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.averaged_inside:
            self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An exception during validation must not leave the average where the trained weights belong."""
        if trainer.state.fn == TrainerFn.FITTING and self.averaged_inside:
            self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the average for good; the trained weights stay here for checkpoints written afterwards."""
        if self.has_average and not self.averaged_inside:
            self._swap_in(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._shadow:
            return
        parameters = self._parameters(pl_module)
        raw = self._raw if self._raw is not None else [p.detach() for _, p in parameters]
        names = self._aliases(pl_module)
        current, averaged = dict(checkpoint["state_dict"]), dict(checkpoint["state_dict"])
        for (name, _), value in zip(parameters, raw, strict=True):
            for alias in names[name]:
                current[alias] = value
                averaged[alias] = self._shadow[name] if self.has_average else value
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = averaged
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.n_averaged)}

    @staticmethod
    def _parameters(pl_module: nn.Module) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in pl_module.named_parameters() if p.is_floating_point()]

    @staticmethod
    def _aliases(pl_module: LightningModule) -> dict[str, list[str]]:
        """First name of a parameter -> all its names: a shared parameter is in the state dict once per owner."""
        first: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        for name, p in pl_module.named_parameters(remove_duplicate=False):
            names.setdefault(first.setdefault(id(p), name), []).append(name)
        return names

    @staticmethod
    def _lr_scale(trainer: Trainer) -> float:
        group = next(g for g in trainer.optimizers[0].param_groups if g.get("base_lr", g["lr"]) > 0)
        return group["lr"] / group.get("base_lr", group["lr"])

    @torch.no_grad()
    def _swap_in(self, pl_module: nn.Module) -> None:
        parameters = [p for _, p in self._parameters(pl_module)]
        self._raw = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, list(self._shadow.values()))

    @torch.no_grad()
    def _swap_out(self, pl_module: nn.Module) -> None:
        torch._foreach_copy_([p for _, p in self._parameters(pl_module)], self._raw or [])
        self._raw = None
