"""The hybrid mixer: attention and Mamba in parallel on the same input (Hymba, arXiv:2411.13676)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_lightning.model.attention import attention_branch
from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.layers import Linear, fused_linear, rms_norm
from hymba_lightning.model.mamba import DepthwiseConv, TimeStepProjection, mamba_branch


class LayerState(NamedTuple):
    """What one layer remembers of the tokens before: enough to cut a sequence anywhere."""

    keys: Tensor  # (B, P, G, K), rotated; P <= window - 1, or all tokens in a global layer
    values: Tensor  # (B, P, G, K)
    conv: Tensor  # (B, E, W-1) last inputs of the convolution
    scan: Tensor  # (B, E, N) float32
    hidden: Tensor | None = None  # (B,) int64: so many of a row's first keys are padding; None: none of any row


class Merge(torch.autograd.Function):
    """sigmoid(α)·a + (1-sigmoid(α))·s of a and s (B, T, D), with one α or one per channel (D,).

    Its gradient is written out so that a compiler can take α's sums over `unit` channels in the pass that reads a and
    the gradient for attention's own backward.
    """

    @staticmethod
    def forward(ctx, a_BTD, s_BTD, alpha, unit):  # type: ignore[no-untyped-def]
        """The two branches, α (1,) or (D,), and a divisor of D → (B, T, D)."""
        ctx.save_for_backward(a_BTD, s_BTD, alpha)
        ctx.unit = unit
        weight = torch.sigmoid(alpha).to(a_BTD.dtype)
        return weight * a_BTD + (1 - weight) * s_BTD

    @staticmethod
    def backward(ctx, g_BTD):  # type: ignore[no-untyped-def]
        """Gradients of a, s and α."""
        a_BTD, s_BTD, alpha = ctx.saved_tensors
        gate = torch.sigmoid(alpha)
        weight = gate.to(a_BTD.dtype)
        along = (g_BTD.float() * (a_BTD.float() - s_BTD.float())).unflatten(-1, (-1, ctx.unit))
        total = along.sum(-1).sum() if alpha.numel() == 1 else along.sum((0, 1)).flatten()
        return weight * g_BTD, (1 - weight) * g_BTD, (gate * (1 - gate) * total).to(alpha.dtype), None


class HybridMixer(nn.Module):
    """sigmoid(α)·attention + (1-sigmoid(α))·mamba, then the zero-initialised output projection; or, under merge
    'concat', that projection of both side by side.

    Under `branch_gate` both are first multiplied by gates that few channels of the input open (a "sparse" gate on each
    head's output: modded-nanogpt, 2025).

    `shared_kv` is another layer's key/value projection to use instead of an own one.
    """

    def __init__(
        self, config: HymbaConfig, runtime: RuntimeConfig, window: int | None, shared_kv: Linear | None = None
    ) -> None:
        super().__init__()
        d, e, n, rank = config.d_model, config.d_inner, config.d_state, config.resolved_dt_rank
        bits = runtime.qat_bits
        self.head_dim, self.window, self.runtime = config.head_dim, window, runtime
        self.branch_norm, self.value_gate, self.dynamics_norm = (
            config.branch_norm,
            config.value_gate,
            config.dynamics_norm,
        )
        self.c_q = Linear(d, d, qat_bits=bits)
        own_kv = Linear(d, 2 * config.n_kv_heads * config.head_dim, qat_bits=bits) if shared_kv is None else shared_kv
        self.kv_proj = own_kv
        self.mamba_proj = Linear(d, 2 * e, qat_bits=bits)
        self.conv1d = DepthwiseConv(e, config.d_conv)
        self.x_proj = Linear(e, rank + 2 * n, qat_bits=bits)
        self.dt_proj = TimeStepProjection(rank, e)
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        concat = config.merge == "concat"
        self.mamba_out_proj = None if concat else Linear(e, d, qat_bits=bits)
        self.proj = Linear(d + e if concat else d, d, zero_init=True, qat_bits=bits)
        self.q_gain = nn.Parameter(torch.full((config.n_heads,), float(config.qk_gain)))
        self.merge_alpha = None if concat else nn.Parameter(torch.zeros(1 if config.merge == "scalar" else d))
        # Rows: one for each head_dim channels of attention's output, then of the scan's.
        self.branch_gate = (
            nn.Parameter(torch.zeros(config.gate_groups, config.branch_gate)) if config.branch_gate else None
        )

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """x (B, T, D) → (B, T, D), and the layer's new state when asked."""
        width = self.A_log.size(0)
        kv = self.kv_proj.weight.size(0) // 2
        q_BTD, k_BTC, v_BTC, u_BTE, z_BTE = fused_linear(
            x_BTD,
            [self.c_q, self.kv_proj, self.mamba_proj],
            [self.c_q.weight.size(0), kv, kv, width, width],
            unit=math.gcd(self.head_dim, width),
        )
        if self.value_gate:
            v_BTC = F.silu(v_BTC)
        past = None if state is None else (state.keys, state.values, state.hidden)
        attended_BTD, kept = attention_branch(
            q_BTD,
            k_BTC,
            v_BTC,
            self.q_gain,
            rope,
            head_dim=self.head_dim,
            window=self.window,
            past=past,
            backend=self.runtime.attention_backend,
        )
        y_BTE, conv_state, scan_state = mamba_branch(
            u_BTE,
            z_BTE,
            self.conv1d,
            self.x_proj,
            self.dt_proj,
            self.A_log,
            self.D,
            conv_state=None if state is None else state.conv,
            scan_state=None if state is None else state.scan,
            normalise=self.dynamics_norm,
            return_state=return_state,
            conv_backend=self.runtime.conv_backend,
            scan_backend=self.runtime.scan_backend,
        )
        scanned_BTD = y_BTE if self.mamba_out_proj is None else self.mamba_out_proj(y_BTE)
        if self.branch_norm:
            attended_BTD, scanned_BTD = rms_norm(attended_BTD), rms_norm(scanned_BTD)
        if self.branch_gate is not None:
            attended_BTD, scanned_BTD = self.gated(x_BTD, attended_BTD, scanned_BTD)
        if self.merge_alpha is None:
            out_BTD = self.proj(torch.cat([attended_BTD, scanned_BTD], dim=-1))
        else:
            out_BTD = self.proj(Merge.apply(attended_BTD, scanned_BTD, self.merge_alpha, self.head_dim))
        return out_BTD, LayerState(*kept[:2], conv_state, scan_state, kept[2]) if return_state else None

    def gated(self, x_BTD: Tensor, attended_BTD: Tensor, scanned_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches' outputs (B, T, D), the scan's (B, T, E) under 'concat', times the gates that the first
        channels of x (B, T, D) open."""
        weight = self.branch_gate.to(x_BTD.dtype)
        gate_BTG1 = 2 * torch.sigmoid(F.linear(x_BTD[..., : weight.size(1)], weight))[..., None]
        heads = attended_BTD.size(-1) // self.head_dim
        attention_gate, scan_gate = gate_BTG1.split([heads, gate_BTG1.size(-2) - heads], dim=-2)
        return (
            (attended_BTD.unflatten(-1, (-1, self.head_dim)) * attention_gate).flatten(-2),
            (scanned_BTD.unflatten(-1, (-1, self.head_dim)) * scan_gate).flatten(-2),
        )
