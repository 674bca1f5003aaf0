"""Averaged weights: an exponential moving average (EMA) or a uniform one (SWA), kept beside the trained weights.

The average is what gets validated, tested and exported; the trained ("raw") weights are kept for an exact resume.
Checkpoints use the key names of Lightning's WeightAveraging: `state_dict` holds the average, `current_model_state`
the raw weights, `averaging_state` the count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class EMA(Callback):
    """Keeps a float32 average of all floating-point parameters, updated after every optimizer step.

    Args:
        decay: of the exponential average, per optimizer step; None turns averaging off altogether.
        mode: "ema", which starts from the initial weights, or "swa": the uniform mean of the weights at every
            `swa_every`-th step from the point where the learning-rate factor is below `swa_start`.
        swa_start: learning-rate factor in (0, 1] below which SWA collects.
        swa_every: optimizer steps between two SWA samples.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        decay: float | None = 0.997,
        mode: Literal["ema", "swa"] = "ema",
        swa_start: float = 0.2,
        swa_every: int = 50,
    ) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; it must be in [0, 1), or null to turn averaging off")
        if mode not in ("ema", "swa"):
            raise ValueError(f"averaging mode {mode!r} is unknown; use 'ema' or 'swa'")
        if not 0 < swa_start <= 1:
            raise ValueError(f"swa_start is {swa_start}; it must be in (0, 1]")
        if swa_every < 1:
            raise ValueError(f"swa_every is {swa_every}; it must be 1 or more optimizer steps")
        self.decay = decay
        self.mode = mode
        self.swa_start = swa_start
        self.swa_every = swa_every
        self.n_averaged = 0
        self._last_step = 0
        self._shadow: dict[str, Tensor] = {}
        self._raw: list[Tensor] | None = None
        self._restored: dict[str, Tensor] | None = None

    @property
    def enabled(self) -> bool:
        """Whether averaging is on."""
        return self.decay is not None

    @property
    def active(self) -> bool:
        """Whether there is an average that differs from the raw weights."""
        return bool(self._shadow) and (self.mode == "ema" or self.n_averaged > 0)

    def averaged_state(self) -> dict[str, Tensor]:
        """Parameter name -> averaged float32 tensor (no copies); empty while there is no average."""
        return dict(self._shadow) if self.active else {}

    @contextmanager
    def swapped(self, pl_module: LightningModule) -> Iterator[None]:
        """Averaged weights inside, raw ones outside. Inside another swap, or without an average, it does nothing."""
        if self._raw is not None or not self.active:
            yield
            return
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._shadow, self._raw, self._restored = {}, None, None
            self.n_averaged = self._last_step = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning has already loaded `state_dict`, the average, into the module: right for testing, not to resume."""
        if trainer.state.fn != TrainerFn.FITTING:
            # The module now holds other weights than the ones averaged here.
            self._shadow, self._raw = {}, None
            return
        if "current_model_state" not in checkpoint:
            return
        self.n_averaged = int(checkpoint.get("averaging_state", {}).get("n_averaged", 0))
        self._restored = {
            name: checkpoint["state_dict"][name].detach().to(torch.float32, copy=True)
            for name, _ in self._averaged_parameters(pl_module)
        }
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        source = self._restored or {}
        with torch.no_grad():
            self._shadow = {
                name: source.get(name, p.detach()).to(device=p.device, dtype=torch.float32, copy=True)
                for name, p in self._averaged_parameters(pl_module)
            }
        self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step; micro-batches that only accumulate gradients leave `global_step` as it is."""
        if not self._shadow or trainer.global_step <= self._last_step:
            return
        self._last_step = trainer.global_step
        if self.mode == "ema":
            weight = 1.0 - self.decay
        elif self._last_step % self.swa_every == 0 and self._lr_scale(trainer) < self.swa_start:
            weight = 1.0 / (self.n_averaged + 1)
        else:
            return
        with torch.no_grad():
            current = [p.detach().float() for _, p in self._averaged_parameters(pl_module)]
            torch._foreach_lerp_(list(self._shadow.values()), current, weight)
        self.n_averaged += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._raw is None and self.active:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._raw is not None:
            self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An exception during validation must not leave the average where the raw weights belong."""
        if trainer.state.fn == TrainerFn.FITTING and self._raw is not None:
            self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the average for good; the raw weights stay here for checkpoints written afterwards."""
        if self._raw is None and self.active:
            self._swap_in(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._shadow:
            return
        parameters = self._averaged_parameters(pl_module)
        raw = self._raw if self._raw is not None else [p.detach() for _, p in parameters]
        names = self._aliases(pl_module)
        current, averaged = dict(checkpoint["state_dict"]), dict(checkpoint["state_dict"])
        for (name, _), value in zip(parameters, raw, strict=True):
            for alias in names[name]:
                current[alias] = value
                averaged[alias] = self._shadow[name] if self.active else value
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = averaged
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.n_averaged)}

    @staticmethod
    def _averaged_parameters(pl_module: LightningModule) -> list[tuple[str, Tensor]]:
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
    def _swap_in(self, pl_module: LightningModule) -> None:
        parameters = [p for _, p in self._averaged_parameters(pl_module)]
        self._raw = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, list(self._shadow.values()))

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        torch._foreach_copy_([p for _, p in self._averaged_parameters(pl_module)], self._raw)
        self._raw = None
