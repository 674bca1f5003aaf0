"""Muon for matrices, Adam for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba_lightning.muon import Muon
from hymba_lightning.training.optim import HymbaOptimizer
from hymba_lightning.training.optim_config import MUON_DTYPES, OptimizerConfig


class Optimizer(HymbaOptimizer):
    """The group of matrices has `momentum`, which follows the schedule.

    Raises:
        ValueError: a parameter of that group is not a matrix.
    """

    algorithm = "muon"
    matrix_lr = 0.02
    float32_state = ("momentum_buffer", "neuron_moment")

    def prepare(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Muon:
        for group in groups:
            group.setdefault("momentum", config.first_momentum)
            not_matrices = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if not_matrices:
                raise ValueError(f"Muon group {group['name']!r} holds parameters of shape {not_matrices}")
        return Muon(
            ns_steps=config.ns_steps,
            coefficients=config.muon_coefficients,
            nesterov=config.muon_nesterov,
            row_normalize=config.muon_row_normalize,
            shard=config.muon_shard,
            dtype=MUON_DTYPES[config.muon_dtype],
            neuron_beta=config.muon_neuron_beta,
            cautious=config.cautious_decay,
        )

    def set_schedule(self, lr_scale: float, momentum: float) -> None:
        super().set_schedule(lr_scale, momentum)
        for group in self.groups_of(self.algorithm):
            group["momentum"] = momentum

    def update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        self.rule.step(
            params,
            [p.grad for p in params],
            [self._momentum_buffer(p) for p in params],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            neurons=[self._neuron_moment(p) for p in params] if self.rule.neuron_beta else None,
        )

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state["momentum_buffer"]

    def _neuron_moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "neuron_moment" not in state:
            state["neuron_moment"] = torch.zeros(len(parameter), 1, dtype=torch.float32, device=parameter.device)
        return state["neuron_moment"]
