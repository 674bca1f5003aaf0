"""Settings of the optimizer and of its schedule."""

from dataclasses import dataclass
from typing import Literal

import torch

from hymba_lightning.training.muon import iteration_coefficients
from hymba_lightning.training.schedule import WarmdownShape, muon_momentum, warmdown_lr_scale

MUON_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class OptimizerConfig:
    """Learning rates, momentum, decay and the choice of groups."""

    embed_lr: float | None = None
    """Adam's learning rate of the token table; None means 0.05 for a tied table, 0.6 for an untied one."""
    head_lr: float = 0.008
    """Adam's learning rate of an untied head."""
    matrix_lr: float = 0.02
    """Muon's learning rate of all projection matrices."""
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
    """Decoupled weight decay, of Muon's matrices only."""
    cautious_decay: bool = False
    """Decay only the weights that the update moves towards zero (arXiv:2510.12402)."""
    decay_with_lr: bool = False
    """Let weight decay itself fall with the learning rate, so that what is taken off in a step falls with its square."""
    muon_momentum: float = 0.95
    """Muon's momentum after its warm-up."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    muon_momentum_warmup_steps: int = 500
    """Optimizer steps over which Muon's momentum grows; 0 turns the warm-up off."""
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
    warmdown_iters: int = 3000
    """Length of the learning rate's warmdown, in optimizer steps at the mean step time so far; 0 turns it off."""
    warmdown_shape: WarmdownShape = "cosine"
    """Shape of the warmdown: "cosine" or "linear"."""
    train_conv: bool = True
    """False leaves the conv weights untrained, as the reference does by oversight."""
    dynamics_in_muon: bool = False
    """True puts A_log and the dt projection under Muon with weight decay, as the reference does by oversight."""

    def __post_init__(self) -> None:
        for name in ("embed_lr", "head_lr", "matrix_lr", "scalar_lr", "dynamics_lr", "conv_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"optimizer.{name} is {value}; it must be 0 or positive")
        for name in ("muon_momentum", "muon_momentum_start", "muon_neuron_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        self.adam_betas = tuple(self.adam_betas)
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"optimizer.adam_betas is {self.adam_betas}; it must be two numbers in [0, 1)")
        if not self.adam_eps > 0:
            raise ValueError(f"optimizer.adam_eps is {self.adam_eps}; it must be positive, e.g. 1e-8")
        if not 1 <= self.ns_steps <= 20:
            raise ValueError(f"optimizer.ns_steps is {self.ns_steps}; it must be between 1 and 20, usually 5")
        for name in ("muon_momentum_warmup_steps", "warmdown_iters"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 (off) or positive")
        if self.warmdown_shape not in ("cosine", "linear"):
            raise ValueError(f"optimizer.warmdown_shape is {self.warmdown_shape!r}; use 'cosine' or 'linear'")
        iteration_coefficients(self.muon_coefficients, self.ns_steps)
        if self.muon_dtype not in MUON_DTYPES:
            raise ValueError(f"optimizer.muon_dtype is {self.muon_dtype!r}; use one of {', '.join(MUON_DTYPES)}")

    def lr_scale(
        self,
        *,
        remaining_seconds: float | None = None,
        mean_step: float | None = None,
        remaining_steps: int | None = None,
    ) -> float:
        """Learning-rate factor: `warmdown_lr_scale` with this config's length and shape."""
        return warmdown_lr_scale(
            warmdown_iters=self.warmdown_iters,
            shape=self.warmdown_shape,
            remaining_seconds=remaining_seconds,
            mean_step=mean_step,
            remaining_steps=remaining_steps,
        )

    def momentum(self, step: int) -> float:
        """Muon's momentum at optimizer step `step` (0-based)."""
        return muon_momentum(
            step,
            start=self.muon_momentum_start,
            end=self.muon_momentum,
            warmup_steps=self.muon_momentum_warmup_steps,
        )
