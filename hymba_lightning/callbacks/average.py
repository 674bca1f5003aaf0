"""Averaged weights, kept beside the trained ones: exponential over a share of the run, or uniform over its end.

The average is what gets validated, tested and exported; the trained ("raw") weights are kept for an exact resume.
Checkpoints use the key names of Lightning's WeightAveraging: `state_dict` holds the average, `current_model_state`
the raw weights, `averaging_state` the count and the kind. Sources: Karras et al., arXiv:2312.02696, for the
exponential average whose length is a share of the steps done; Izmailov et al., arXiv:1803.05407, for the uniform one.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from hymba_lightning.run.run import Run

log = logging.getLogger("hymba_lightning")

AverageKind = Literal["ema", "uniform", "none"]


class WeightAverage(Callback):
    """Keeps a float32 average of all floating-point parameters, updated after every optimizer step.

    "ema" with a window takes in the weights after step t by 1 / (window · t · s), at most 1, where s is the factor of
    the learning rates: the average's length grows with the run and stays a share of it, the weights it starts from
    drop out, and where a warmdown takes the noise out of the weights the average shortens instead of lagging behind
    it. "ema" with a decay is the plain one, started from the initial weights. "uniform" is the mean of the weights
    after every step of the last `window` of the run, by the clock; before that there is no average.

    Args:
        kind: "ema", "uniform", or "none" to average nothing.
        window: length of the average as a share of the run: of its steps so far, times the learning rates' factor
            ("ema"), or of its end ("uniform").
        decay: of the exponential average, per optimizer step, instead of a window; the reference has 0.997.

    Raises:
        ValueError: an argument is out of range, or a decay goes with another kind than "ema".
    """

    def __init__(self, kind: AverageKind = "ema", window: float = 0.03, decay: float | None = None) -> None:
        if kind not in ("ema", "uniform", "none"):
            raise ValueError(f"average is {kind!r}; use 'ema', 'uniform' or 'none'")
        if not 0 < window <= 1:
            raise ValueError(f"average_window is {window}; it must be a share of the run in (0, 1], e.g. 0.03")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be in [0, 1), or null for average_window")
        if decay is not None and kind != "ema":
            raise ValueError(f"ema_decay is {decay} and average is {kind!r}; set average to 'ema' or ema_decay to null")
        self.kind: AverageKind = kind
        self.window = window
        self.decay = decay
        self.n_averaged = 0
        self._told = decay is None
        self._seen_step = 0
        self._shadow: dict[str, Tensor] = {}
        self._raw: list[Tensor] | None = None
        self._restored: dict[str, Tensor] = {}

    @property
    def has_average(self) -> bool:
        """Whether the weights of the present or latest fit have an average."""
        return bool(self._shadow) and (self.kind == "ema" or self.n_averaged > 0)

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
        """Puts the trained weights into the module for the time of the block, then what was there before."""
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
            self.n_averaged = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """For a fit, takes average and trained weights out of the checkpoint. Lightning has loaded its `state_dict`,
        which is the average: right for a test, not for training."""
        if trainer.state.fn != TrainerFn.FITTING:
            # The module now holds other weights than those averaged here.
            self._shadow, self._raw = {}, None
            return
        if "current_model_state" not in checkpoint:
            return
        state = checkpoint.get("averaging_state", {})
        # Checkpoints from before the kind was kept hold an exponential average.
        kind = state.get("kind", "ema")
        if kind == self.kind:
            self.n_averaged = int(state.get("n_averaged", 0))
            self._restored = {
                name: checkpoint["state_dict"][name].detach().to(torch.float32, copy=True)
                for name, _ in self._parameters(pl_module)
            }
        elif trainer.is_global_zero:
            log.info(
                "the checkpoint's average is of kind %r, this run's of kind %r: it starts anew from the trained "
                "weights",
                kind,
                self.kind,
            )
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights that training starts from, or from the checkpoint's average.

        Raises ValueError where a callback prunes: after the last step, of which an average learns nothing.
        """
        if self.kind != "none":
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            pruning = next((callback for callback in callbacks if isinstance(callback, ModelPruning)), None)
            if pruning is not None:
                raise ValueError(
                    f"{type(pruning).__name__} zeroes trained weights, and their average, which is exported, has "
                    "no zeros: set model.average: none (and model.ema_decay: null)"
                )
            self._shadow = {
                name: self._restored.get(name, p.detach()).to(device=p.device, dtype=torch.float32, copy=True)
                for name, p in self._parameters(pl_module)
            }
        self._restored = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step; micro-batches that only accumulate gradients leave `global_step` alone."""
        if not self._shadow or trainer.global_step <= self._seen_step:
            return
        self._seen_step = trainer.global_step
        self._tell_long_decay(trainer)
        if self.kind == "uniform" and self._progress(trainer) <= 1.0 - self.window:
            self.n_averaged = 0  # a finished run that was given more time: its end is another one now
            return
        self.n_averaged += 1
        if self.kind == "uniform":
            weight = 1.0 / self.n_averaged
        elif self.decay is not None:
            weight = 1.0 - self.decay
        else:
            weight = 1.0 / max(self.window * self.n_averaged * self._lr_scale(trainer), 1.0)
        with torch.no_grad():
            current = [p.detach().float() for _, p in self._parameters(pl_module)]
            torch._foreach_lerp_(list(self._shadow.values()), current, weight)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.has_average and not self.averaged_inside:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.averaged_inside:
            self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An exception must not leave the average of a validation, nor what a test adapted, where the trained weights
        belong."""
        if trainer.state.fn == TrainerFn.TESTING:
            # Not on_test_end, which a subclass may end its results with.
            getattr(pl_module, "put_back_weights", bool)()
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
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.n_averaged), "kind": self.kind}

    def _parameters(self, pl_module: nn.Module) -> list[tuple[str, Tensor]]:
        """Raises ValueError where they are others than those that are averaged."""
        parameters: list[tuple[str, Tensor]] = [
            (name, p) for name, p in pl_module.named_parameters() if p.is_floating_point()
        ]
        strange = next((name for name, _ in parameters if name not in self._shadow), None) if self._shadow else None
        if strange is not None:
            raise ValueError(
                f"the parameter {strange} came in the middle of training (by pruning or a parametrization), and has no "
                "average: set model.average: none, or bring it before the fit"
            )
        return parameters

    @staticmethod
    def _aliases(pl_module: LightningModule) -> dict[str, list[str]]:
        """First name of a parameter -> all its names: a shared parameter is in the state dict once per owner."""
        first: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        for name, p in pl_module.named_parameters(remove_duplicate=False):
            names.setdefault(first.setdefault(id(p), name), []).append(name)
        return names

    def _tell_long_decay(self, trainer: Trainer) -> None:
        """Says once, as soon as the run's length is known, that the average would be of its beginning."""
        clock = None if self._told else Run.of(trainer).clock
        steps = clock.reading.expected_steps if clock is not None else None
        if steps is None or self.decay is None:
            return
        self._told = True
        first = self.decay**steps
        if first > 0.01 and trainer.is_global_zero:
            log.warning(
                "ema_decay %s is too long for this run of about %d steps: %.2g %% of the average will be the "
                "weights it started from; set it to null and use average_window, a share of the run",
                self.decay,
                steps,
                100 * first,
            )

    @staticmethod
    def _lr_scale(trainer: Trainer) -> float:
        """The learning rates' factor of the step just made; 1 for an optimizer without base rates."""
        groups = trainer.optimizers[0].param_groups
        return next((g["lr"] / g["base_lr"] for g in groups if g.get("base_lr", 0.0) > 0), 1.0)

    @staticmethod
    def _progress(trainer: Trainer) -> float:
        """Share of the run done, by its clock."""
        clock = Run.of(trainer).clock
        if clock is None:
            raise RuntimeError("a uniform average needs the run's clock: add WallClock() to the trainer's callbacks")
        return clock.reading.progress

    @torch.no_grad()
    def _swap_in(self, pl_module: nn.Module) -> None:
        parameters = [p for _, p in self._parameters(pl_module)]
        self._raw = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, list(self._shadow.values()))

    @torch.no_grad()
    def _swap_out(self, pl_module: nn.Module) -> None:
        torch._foreach_copy_([p for _, p in self._parameters(pl_module)], self._raw or [])
        self._raw = None
