"""Mamba-2 (arXiv:2405.21060). B batch, T sequence, E d_inner, H heads, P channels of a head, G groups, N d_state,
W d_conv."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.model.layers import DepthwiseConv, TimeStepProjection, rms_norm
from hymba_lightning.model.mixer import HybridMixer
from hymba_lightning.model.roles import Role, parameter
from hymba_lightning.ops.ssd import ssd
from hymba_lightning.ops.ssd.backend_chunked import CHUNK


class Mixer(HybridMixer):
    """Convolution of x, B and C, the state-space dual recurrence with one decay for each head, a gate and an RMS norm.

    mixer_options: `head_dim` P (0: that of attention) and `groups` G of heads that share B and C. States are wide here:
    d_state 64 or 128 costs little. Its state: the convolution's tail (B, E+2GN, W-1) and the recurrence's
    (B, H, P, N), float32.
    """

    options: ClassVar[dict[str, int | float]] = {"head_dim": 0, "groups": 1}

    def input_widths(self, options: dict[str, int | float]) -> list[int]:
        """Of the gate z, and of x, B and C together."""
        e = self.config.d_inner
        self.channels, self.groups = int(options["head_dim"]) or self.config.head_dim, int(options["groups"])
        if self.channels < 1 or e % self.channels:
            raise ValueError(f"mixer_options.head_dim={self.channels} does not divide d_inner={e}")
        self.heads = e // self.channels
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"mixer_options.groups={self.groups} does not divide the {self.heads} heads")
        return [e, e + 2 * self.groups * self.config.d_state]

    def make_branch(self) -> None:
        """conv1d, dt_proj, A_log (H,) and D (H,)."""
        self.conv1d = DepthwiseConv(self.widths[1], self.config.d_conv)
        self.dt_proj = TimeStepProjection(self.config.d_model, self.heads)
        self.A_log = parameter(torch.linspace(1, 16, self.heads).log(), Role.DYNAMICS)
        self.D = parameter(torch.ones(self.heads), Role.CONTROL)

    def branch(
        self,
        x_BTD: Tensor,
        inputs: list[Tensor],
        state: tuple[Tensor, ...] | None,
        return_state: bool,
        doc_position_BT: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        z_BTE, joint_BTX = inputs
        conv_state, ssd_state = (None, None) if state is None else state
        joint_BTX, *new_conv = self.conv1d(
            joint_BTX, conv_state, doc_position_BT, return_state=return_state, backend=self.runtime.conv_backend
        )
        shared = self.groups * self.config.d_state
        u_BTE, B_BTX, C_BTX = joint_BTX.split([self.config.d_inner, shared, shared], dim=-1)
        B_BTGN, C_BTGN = (part.unflatten(-1, (self.groups, -1)) for part in (B_BTX, C_BTX))
        if self.config.dynamics_norm:
            B_BTGN, C_BTGN = rms_norm(B_BTGN), rms_norm(C_BTGN)
        passed = ssd(
            u_BTE.unflatten(-1, (self.heads, -1)),
            self.dt_proj(x_BTD),
            -self.A_log.float().exp(),
            B_BTGN,
            C_BTGN,
            self.D,
            dt_bias_H=self.dt_proj.bias,
            initial_state_BHPN=ssd_state,
            doc_position_BT=doc_position_BT,
            return_state=return_state,
            backend=self.runtime.scan_backend,
        )
        y_BTHP, *new_ssd = passed if isinstance(passed, tuple) else (passed,)
        return rms_norm(y_BTHP.flatten(-2) * F.silu(z_BTE)), (*new_conv, *new_ssd)

    def decay_times(self, x_BTD: Tensor) -> Tensor:
        """(H,) for each head."""
        dt_BTH = F.softplus(self.dt_proj(x_BTD.float()) + self.dt_proj.bias)
        return 1 / (dt_BTH.mean((0, 1)) * self.A_log.float().exp())

    def branch_flops(self) -> float:
        """Scores within a chunk and their product with the inputs; building and reading the states."""
        e, n = self.config.d_inner, self.config.d_state
        return 2 * CHUNK * (self.groups * n + e) + 4 * n * e

    def branch_activations(self) -> float:
        return 8 * self.config.d_inner + 6 * self.groups * self.config.d_state + 4 * CHUNK * self.heads
