"""Settings of the optimizer and of its schedule."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from hymba_lightning.field_types import settle
from hymba_lightning.muon import iteration_coefficients
from hymba_lightning.run.run import ClockReading
from hymba_lightning.training.optimizers import OPTIMIZERS
from hymba_lightning.training.schedule import (
    WARMDOWN_SHAPES,
    WarmdownShape,
    muon_momentum,
    warmdown_left,
    warmdown_left_of_steps,
    warmdown_lr_scale,
    warmup_lr_scale,
)

MUON_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


# Of a rate: far beyond use, and within float32.
LARGEST = 1_000_000


@dataclass
class OptimizerConfig:
    """Learning rates, momentum, decay, their schedule and the choice of groups.

    Lengths of the schedule are shares of the run: of the clock's budget or of max_steps, whichever is further on.
    `warmdown_iters` and `muon_momentum_warmup_steps` set them in optimizer steps instead, as the reference run does.
    """

    name: str = "muon"
    """What moves the matrices, and with adamw all, by the name of its file in training/optimizers."""
    options: dict[str, float] = field(default_factory=dict)
    """What an optimizer has beyond the fields here, by name; its file says what that is."""
    embed_lr: float | None = None
    """Adam's learning rate of the token table; None means 0.02 for a tied table, 0.6 for an untied one. The
    reference has 0.05 when tied, which fits 500,000 tokens a step; with a few thousand the loss rises at the start."""
    head_lr: float = 0.008
    """Adam's learning rate of an untied head."""
    matrix_lr: float | None = None
    """Learning rate of all projection matrices; null takes the optimizer's own, 0.02 for Muon."""
    scalar_lr: float = 0.02
    """Adam's learning rate of vectors, gates, biases and the bigram table."""
    dynamics_lr: float = 0.002
    """Adam's learning rate of what sets the state's decay: A_log, dt bias and dt projection (no weight decay)."""
    conv_lr: float = 0.02
    """Adam's learning rate of the depthwise convolution's weights."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.02
    """Decoupled weight decay of the matrices."""
    embed_decay: float = 0.0
    """Decoupled weight decay of the token table."""
    cautious_decay: bool = False
    """Muon: decay only the weights that the update moves towards zero (arXiv:2510.12402)."""
    decay_with_lr: bool = False
    """Let weight decay fall with the learning rate, so that what is taken off in a step falls with its square."""
    muon_momentum: float = 0.95
    """Muon's momentum after its warm-up."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    momentum_warmup_share: float = 0.1
    """Share of the run over which Muon's momentum grows; 0 turns its warm-up off."""
    muon_momentum_warmup_steps: int | None = None
    """Optimizer steps over which Muon's momentum grows (the reference has 500); null for momentum_warmup_share."""
    muon_nesterov: bool = True
    """Orthogonalise gradient + momentum * buffer instead of the buffer alone."""
    ns_steps: int = 5
    """Newton-Schulz steps."""
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """Coefficients of the Newton-Schulz steps: one quintic for all, or Polar Express's one per step."""
    muon_row_normalize: bool = True
    """Scale every row to length 1 before Newton-Schulz (MuonEq-R); False is what the reference does."""
    muon_neuron_beta: float = 0.0
    """Decay of a second moment per row, which evens out the sizes of the neurons' updates (NorMuon, arXiv:2510.05491,
    which takes 0.95); 0 for none."""
    muon_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the Newton-Schulz steps; auto takes bfloat16 on a GPU and float32 on a CPU, where that is faster."""
    muon_shard: bool = True
    """Share the Newton-Schulz work out over ranks."""
    warmup_share: float = 0.1
    """Share of the run over which the learning rates grow from a tenth to full; 0 starts with full ones."""
    warmdown_share: float = 0.8
    """Share of the run, at its end, over which the learning rates fall to lr_floor; 0 turns the warmdown off."""
    warmdown_iters: int | None = None
    """Length of the warmdown in optimizer steps at the mean step time so far (the reference has 3000), 0 for none; null
    for warmdown_share."""
    warmdown_shape: WarmdownShape = "linear"
    """Shape of the warmdown; "sqrt" is one minus the square root of the part that is over."""
    lr_floor: float = 0.1
    """Factor of the learning rates at the end of the warmdown, 0 to 1."""
    train_conv: bool = True
    """False leaves the conv weights untrained, as the reference does by oversight."""
    dynamics_in_muon: bool = False
    """True puts A_log and the dt projection among the matrices with weight decay, as the reference does by
    oversight."""

    def __post_init__(self) -> None:
        settle(self, "optimizer.")
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name is {self.name!r}; use one of {', '.join(OPTIMIZERS)}")
        for name in (
            "embed_lr",
            "head_lr",
            "matrix_lr",
            "scalar_lr",
            "dynamics_lr",
            "conv_lr",
            "weight_decay",
            "embed_decay",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LARGEST:
                raise ValueError(f"optimizer.{name} is {value}; it must lie in 0 … {LARGEST:,}")
        for name in ("muon_momentum", "muon_momentum_start", "muon_neuron_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"optimizer.adam_betas is {self.adam_betas}; it must be two numbers in [0, 1)")
        if not self.adam_eps > 0:
            raise ValueError(f"optimizer.adam_eps is {self.adam_eps}; it must be positive, e.g. 1e-8")
        if not 1 <= self.ns_steps <= 20:
            raise ValueError(f"optimizer.ns_steps is {self.ns_steps}; it must be between 1 and 20, usually 5")
        for name in ("muon_momentum_warmup_steps", "warmdown_iters"):
            value = getattr(self, name)
            if value is not None and value < 0:
                share = "momentum_warmup_share" if name.startswith("muon") else "warmdown_share"
                raise ValueError(f"optimizer.{name} is {value}; it must be 0 (off), positive, or null for {share}")
        for name in ("warmup_share", "warmdown_share", "momentum_warmup_share", "lr_floor"):
            if not 0 <= getattr(self, name) <= 1:
                what = "a factor" if name == "lr_floor" else "a share of the run"
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be {what} in [0, 1]")
        if self.warmdown_shape not in WARMDOWN_SHAPES:
            raise ValueError(
                f"optimizer.warmdown_shape is {self.warmdown_shape!r}; use one of {', '.join(WARMDOWN_SHAPES)}"
            )
        iteration_coefficients(self.muon_coefficients, self.ns_steps)
        if self.muon_dtype not in MUON_DTYPES:
            raise ValueError(f"optimizer.muon_dtype is {self.muon_dtype!r}; use one of {', '.join(MUON_DTYPES)}")

    @property
    def first_momentum(self) -> float:
        """Muon's momentum at the first step of a run."""
        steps = self.muon_momentum_warmup_steps
        warmed = self.momentum_warmup_share > 0 if steps is None else steps > 0
        return self.muon_momentum_start if warmed else self.muon_momentum

    def momentum(self, reading: ClockReading) -> float:
        """Muon's momentum for the step that follows the clock's reading."""
        if self.first_momentum == self.muon_momentum:
            return self.muon_momentum
        steps = self.muon_momentum_warmup_steps
        done = reading.progress / self.momentum_warmup_share if steps is None else reading.step / steps
        return muon_momentum(done, start=self.muon_momentum_start, end=self.muon_momentum)

    def lr_scale(self, reading: ClockReading) -> float:
        """Factor in [0, 1] of every learning rate for the step that follows the clock's reading."""
        if self.warmdown_iters is None:
            left = warmdown_left(reading.progress, self.warmdown_share)
        else:
            left = warmdown_left_of_steps(
                self.warmdown_iters,
                remaining_seconds=reading.remaining,
                mean_step=reading.mean_step,
                remaining_steps=reading.remaining_steps,
            )
        warmup = warmup_lr_scale(reading.progress, self.warmup_share)
        return warmup * warmdown_lr_scale(left, self.warmdown_shape, self.lr_floor)

    def lengths_beyond(self, steps: int) -> list[str]:
        """One sentence, with the remedy, for each length in steps that is longer than a run of `steps` steps."""
        notes = []
        if self.warmdown_iters is not None and self.warmdown_iters > steps:
            first = warmdown_lr_scale(steps / self.warmdown_iters, self.warmdown_shape, self.lr_floor)
            notes.append(
                f"optimizer.warmdown_iters {self.warmdown_iters} is longer than this run of about {steps} "
                f"steps: the learning rates never get above {100 * first:.2g} % of what they are set to; "
                "set it to null and use optimizer.warmdown_share, a share of the run"
            )
        warmup = self.muon_momentum_warmup_steps
        if warmup is not None and warmup > steps and self.first_momentum != self.muon_momentum:
            last = muon_momentum(steps / warmup, start=self.muon_momentum_start, end=self.muon_momentum)
            notes.append(
                f"optimizer.muon_momentum_warmup_steps {warmup} is longer than this run of about {steps} "
                f"steps: Muon's momentum ends at {last:.3f} instead of {self.muon_momentum}; set it to null "
                "and use optimizer.momentum_warmup_share, a share of the run"
            )
        return notes
