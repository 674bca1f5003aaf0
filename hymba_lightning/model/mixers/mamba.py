"""The selective scan of Mamba (arXiv:2312.00752). B batch, T sequence, E d_inner, N d_state, R dt_rank, W d_conv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.model.layers import DepthwiseConv, Linear, TimeStepProjection, rms_norm
from hymba_lightning.model.mixer import HybridMixer
from hymba_lightning.model.roles import Role, parameter
from hymba_lightning.ops.selective_scan import selective_scan


class Mixer(HybridMixer):
    """Convolution, input-dependent dt, B and C, and the gated selective scan: a decay for each channel and state.

    Its state: the convolution's tail (B, E, W-1) and the scan's state (B, E, N), float32.
    """

    def input_widths(self, options: dict[str, int | float]) -> list[int]:
        """Of u and of the gate z."""
        if self.config.d_state > 64:
            raise ValueError(
                f"d_state={self.config.d_state} is over 64, the most that the scan's kernels hold in registers"
            )
        return [self.config.d_inner] * 2

    def make_branch(self) -> None:
        """conv1d, x_proj (dt's low-rank vector, B, C), dt_proj, A_log (E, N) and D (E,)."""
        config = self.config
        e, n, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        self.conv1d = DepthwiseConv(e, config.d_conv)
        self.x_proj = Linear(e, rank + 2 * n)
        self.dt_proj = TimeStepProjection(rank, e)
        self.A_log = parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(e, 1), Role.DYNAMICS)
        self.D = parameter(torch.ones(e), Role.CONTROL)

    def branch(
        self,
        x_BTD: Tensor,
        inputs: list[Tensor],
        state: tuple[Tensor, ...] | None,
        return_state: bool,
        doc_position_BT: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        u_BTE, z_BTE = inputs
        conv_state, scan_state = (None, None) if state is None else state
        u_BTE, *new_conv = self.conv1d(
            u_BTE, conv_state, doc_position_BT, return_state=return_state, backend=self.runtime.conv_backend
        )
        n = self.config.d_state
        dt_low_BTR, B_BTN, C_BTN = self.x_proj(u_BTE).split([self.dt_proj.weight.size(1), n, n], dim=-1)
        dt_low_BTR, B_BTN, C_BTN = self.normed_dynamics(dt_low_BTR, B_BTN, C_BTN)
        scanned = selective_scan(
            u_BTE,
            self.dt_proj(dt_low_BTR),
            -self.A_log.float().exp(),
            B_BTN,
            C_BTN,
            self.D,
            z_BTE,
            dt_bias_E=self.dt_proj.bias,
            initial_state_BEN=scan_state,
            doc_position_BT=doc_position_BT,
            return_state=return_state,
            backend=self.runtime.scan_backend,
        )
        y_BTE, *new_scan = scanned if isinstance(scanned, tuple) else (scanned,)
        return y_BTE, (*new_conv, *new_scan)

    def normed_dynamics(self, dt_low_BTR: Tensor, B_BTN: Tensor, C_BTN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (before its projection), B and C of the scan, RMS-normalised where the config says so."""
        if not self.config.dynamics_norm:
            return dt_low_BTR, B_BTN, C_BTN
        return rms_norm(dt_low_BTR), rms_norm(B_BTN), rms_norm(C_BTN)

    def scan_input(self, x_BTD: Tensor) -> Tensor:
        """Of the mixer's input (B, T, D) what goes into the convolution (B, T, E)."""
        return self.mamba_proj(x_BTD).split(self.widths, dim=-1)[0]

    def decay_times(self, x_BTD: Tensor) -> Tensor:
        """Mean tokens until a state has decayed to 1/e, (E, N): one for each channel and state."""
        u_BTE = self.scan_input(x_BTD)
        (convolved_BTE,) = self.conv1d(u_BTE)
        assert isinstance(convolved_BTE, Tensor)
        n = self.config.d_state
        dynamics = self.x_proj(convolved_BTE).split([self.dt_proj.weight.size(1), n, n], dim=-1)
        dt_low_BTR = self.normed_dynamics(*dynamics)[0]
        dt_BTE = F.softplus(self.dt_proj(dt_low_BTR.float()) + self.dt_proj.bias)
        return 1 / (dt_BTE.mean((0, 1))[:, None] * self.A_log.float().exp())

    def branch_flops(self) -> float:
        """The recurrence and its read-out, about 9 for each channel and state."""
        return 9 * self.config.d_inner * self.config.d_state

    def branch_activations(self) -> float:
        return 5.2 * self.config.d_inner + 5 * self.config.d_state
