"""One block: the residual mix with x0, the hybrid mixer, the MLP."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.layers import RMS_EPS, Linear, is_plain
from hymba_lightning.model.mixer import LayerState
from hymba_lightning.model.mixers import mixer_class
from hymba_lightning.model.roles import Module, Role, parameter
from hymba_lightning.ops.leaky_square_mlp import leaky_square_mlp
from hymba_lightning.ops.scaled_sum import scaled_sum


def folds_scales(x_BTD: Tensor) -> bool:
    """Whether scales of a projection's outputs are multiplied into its matrix: where a training step waits for memory.
    No pass over the tokens is then needed for them, nor for their gradients, which follow from the matrix's."""
    return x_BTD.is_cuda and torch.is_grad_enabled()


class MLP(Module):
    """W_2 (leaky_relu(W_1 x))², W_2 zero-initialised."""

    part = "mlp"

    def __init__(self, d_model: int, width: int, slope: float, backend: str = "auto") -> None:
        super().__init__()
        self.slope, self.backend = slope, backend
        self.fc = Linear(d_model, width)
        self.proj = Linear(width, d_model, zero_init=True)

    def forward(self, x_BTD: Tensor, scale_D: Tensor | None = None) -> Tensor:
        """(B, T, D) → (B, T, D), times `scale`."""
        if torch.is_grad_enabled() and is_plain(self.fc) and is_plain(self.proj):
            w_in, w_out = self.fc.cast_weight(x_BTD.dtype), self.proj.scaled_weight(scale_D, x_BTD.dtype)
            return leaky_square_mlp(x_BTD, w_in, w_out, self.slope, backend=self.backend)
        # Calibration looks at what the two modules are called with.
        out_BTD = self.proj(F.leaky_relu(self.fc(x_BTD), self.slope).square())
        return out_BTD if scale_D is None else out_BTD * scale_D.to(out_BTD.dtype)


class Block(Module):
    """x ← mix₀·x + mix₁·x0; x ← x + attn_scale·mixer(norm x); x ← x + mlp_scale·mlp(norm x)."""

    def __init__(
        self, config: HymbaConfig, runtime: RuntimeConfig, window: int | None, shared_kv: Linear | None = None
    ) -> None:
        super().__init__()
        d = config.d_model
        self.attn = mixer_class(config.mixer)(config, runtime, window, shared_kv)
        # Not one with another `forward`, unless it says so.
        self.attn_takes_scale = "scale_D" in inspect.signature(self.attn.forward).parameters
        self.mlp = MLP(d, config.mlp_hidden, config.mlp_slope, runtime.mlp_backend)
        self.attn_scale = parameter(torch.ones(d), Role.CONTROL)
        self.mlp_scale = parameter(torch.ones(d), Role.CONTROL)
        self.resid_mix = parameter(torch.stack([torch.ones(d), torch.zeros(d)]), Role.CONTROL)

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: LayerState | None,
        return_state: bool,
        doc_position_BT: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """x and x0 (B, T, D) → x (B, T, D), and the mixer's new state when asked."""
        mix = self.resid_mix.to(x_BTD.dtype)
        x_BTD, normed_BTD = scaled_sum(x_BTD, x0_BTD, mix[0], mix[1], RMS_EPS)
        folds = folds_scales(x_BTD)
        if folds and self.attn_takes_scale:
            mixed_BTD, new_state = self.attn(normed_BTD, rope, state, return_state, doc_position_BT, self.attn_scale)
            x_BTD, normed_BTD = scaled_sum(x_BTD, mixed_BTD, None, None, RMS_EPS)
        else:
            mixed_BTD, new_state = self.attn(normed_BTD, rope, state, return_state, doc_position_BT)
            x_BTD, normed_BTD = scaled_sum(x_BTD, mixed_BTD, None, self.attn_scale.to(x_BTD.dtype), RMS_EPS)
        if folds:
            return x_BTD + self.mlp(normed_BTD, self.mlp_scale), new_state
        x_BTD, _ = scaled_sum(x_BTD, self.mlp(normed_BTD), None, self.mlp_scale.to(x_BTD.dtype))
        return x_BTD, new_state
