"""How a fresh network starts."""

from __future__ import annotations

import torch
from torch import nn

from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.layers import Linear, TimeStepProjection
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.ops.threads import one_torch_thread

# Smaller matrices keep the uniform start: too few rows or columns for an orthogonal one to mean much.
ORTHO_MIN_SIDE = 16


def initialise(net: nn.Module, config: HymbaConfig) -> None:
    """Orthogonal and zero starts of the linears, the time-step bias, and the storage dtype of the dynamics.

    Reads torch's global random state, so `torch.manual_seed` fixes it.
    """
    for module in net.modules():
        if not isinstance(module, Linear | TimeStepProjection):
            continue
        if isinstance(module, Linear) and module.zero_init:
            nn.init.zeros_(module.weight)
        elif config.ortho_init and min(module.weight.shape) >= ORTHO_MIN_SIDE:
            # Threads would make other digits of it, by their number, and on busy cores wait for each other for seconds.
            with one_torch_thread():
                nn.init.orthogonal_(module.weight)
        if isinstance(module, TimeStepProjection) and config.dt_init == "mamba":
            module.draw_bias(config.dt_min, config.dt_max)
    if config.dynamics_dtype == "bfloat16":
        roles = roles_of(net)
        for name, parameter in net.named_parameters():
            if roles[name] in (Role.DYNAMICS, Role.DYNAMICS_MATRIX) and parameter.ndim == 2:
                parameter.data = parameter.data.to(torch.bfloat16)
