"""Lion for matrices (Chen et al., arXiv:2302.06675), Adam for the rest: the sign of a momentum, one buffer a weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from hymba_lightning.training.optim import HymbaOptimizer


class Optimizer(HymbaOptimizer):
    """Options: `beta1`, the share of the momentum in what is taken the sign of, and `beta2`, the momentum's decay."""

    algorithm = "lion"
    matrix_lr = 0.001
    options: ClassVar[dict[str, float]] = {"beta1": 0.9, "beta2": 0.99}
    float32_state = ("momentum",)

    @torch.no_grad()
    def update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state, grad = self.state[parameter], parameter.grad.float()
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            direction = state["momentum"].lerp(grad, 1 - self.rule["beta1"]).sign_()
            state["momentum"].lerp_(grad, 1 - self.rule["beta2"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])
