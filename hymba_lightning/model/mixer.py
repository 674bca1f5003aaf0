"""The hybrid mixer: attention and a recurrent branch in parallel on the same input (Hymba, arXiv:2411.13676).

B batch, T sequence, D d_model, E d_inner, P kept tokens, G key/value heads, K head_dim.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.model.attention import attention_branch, turn_back
from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.layers import Linear, fused_linear, is_plain, rms_norm
from hymba_lightning.model.roles import Module, Role, parameter
from hymba_lightning.model.watch import has_hooks
from hymba_lightning.ops.registry import is_transformed


class LayerState(NamedTuple):
    """What one layer remembers of the tokens before: enough to cut a sequence anywhere. Every tensor has the batch
    first, and a row of it is that sequence's alone."""

    keys: Tensor  # (B, P, G, K), rotated; P <= window - 1, or all tokens in a global layer
    values: Tensor  # (B, P, G, K)
    recurrent: tuple[Tensor, ...]  # the branch's own, of a size that does not grow
    hidden: Tensor | None = None  # (B,) int64: so many of a row's first keys are padding; None: none of any row


def merged(a_BTD: Tensor, s_BTD: Tensor, alpha: Tensor) -> Tensor:
    """sigmoid(α)·a + (1-sigmoid(α))·s of a and s (B, T, D), with one α or one per channel (D,)."""
    weight = torch.sigmoid(alpha).to(a_BTD.dtype)
    return weight * a_BTD + (1 - weight) * s_BTD


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
        return merged(a_BTD, s_BTD, alpha)

    @staticmethod
    def backward(ctx, g_BTD):  # type: ignore[no-untyped-def]
        """Gradients of a, s and α."""
        a_BTD, s_BTD, alpha = ctx.saved_tensors
        gate = torch.sigmoid(alpha)
        weight = gate.to(a_BTD.dtype)
        along = (g_BTD.float() * (a_BTD.float() - s_BTD.float())).unflatten(-1, (-1, ctx.unit))
        total = along.sum(-1).sum() if alpha.numel() == 1 else along.sum((0, 1)).flatten()
        return weight * g_BTD, (1 - weight) * g_BTD, (gate * (1 - gate) * total).to(alpha.dtype), None


class HybridMixer(Module):
    """sigmoid(α)·attention + (1-sigmoid(α))·branch, then the zero-initialised output projection; or, under merge
    'concat', that projection of both side by side.

    Under `branch_gate` both are first multiplied by gates that few channels of the input open (a "sparse" gate on each
    head's output: modded-nanogpt, 2025). `shared_kv` is another layer's key/value projection to use instead of an own
    one. A file in mixers/ has a subclass `Mixer` that gives what is not implemented here.

    Raises:
        ValueError: config.mixer_options has a name or a value that the mixer does not take.
    """

    part = "attention"
    options: ClassVar[dict[str, int | float]] = {}
    """What config.mixer_options may set, with the defaults."""

    def __init__(
        self, config: HymbaConfig, runtime: RuntimeConfig, window: int | None, shared_kv: Linear | None = None
    ) -> None:
        super().__init__()
        d, e = config.d_model, config.d_inner
        self.config, self.window, self.runtime = config, window, runtime
        self.head_dim = config.head_dim
        self.widths = self.input_widths(self.given_options())
        self.c_q = Linear(d, d)
        own_kv = Linear(d, 2 * config.n_kv_heads * config.head_dim) if shared_kv is None else shared_kv
        self.kv_proj = own_kv
        before = {*self._parameters, *self._modules}
        self.mamba_proj = Linear(d, sum(self.widths))
        self.make_branch()
        concat = config.merge == "concat"
        self.mamba_out_proj = None if concat else Linear(e, d)
        # Of the parameters and modules here those of the branch.
        self.branch_names = {*self._parameters, *self._modules} - before
        self.proj = Linear(d + e if concat else d, d, zero_init=True)
        self.q_gain = parameter(torch.full((config.n_heads,), float(config.qk_gain)), Role.CONTROL)
        self.merge_alpha = (
            None if concat else parameter(torch.zeros(1 if config.merge == "scalar" else d), Role.CONTROL)
        )
        # Rows: one for each head_dim channels of attention's output, then of the branch's.
        self.branch_gate = (
            parameter(torch.zeros(config.gate_groups, config.branch_gate), Role.SCALAR) if config.branch_gate else None
        )

    def given_options(self) -> dict[str, int | float]:
        """All options, with the config's values. Raises ValueError for one that this mixer does not have."""
        given = self.config.mixer_options or {}
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"mixer_options has {', '.join(unknown)}, and {self.config.mixer!r} takes {known}")
        return self.options | given

    def input_widths(self, options: dict[str, int | float]) -> list[int]:
        """Columns of each projection of the input that the branch takes; called first, with all `options`. Raises
        ValueError for sizes that it does not have."""
        raise NotImplementedError

    def make_branch(self) -> None:
        """Makes the branch's parameters, beside its projections of the mixer's input and to its output."""
        raise NotImplementedError

    def branch(
        self,
        x_BTD: Tensor,
        inputs: list[Tensor],
        state: tuple[Tensor, ...] | None,
        return_state: bool,
        doc_position_BT: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mixer's input, its projections (B, T, width) and the state before (None: no tokens) → (B, T, E), and with
        `return_state` the state after these tokens. Where there are document positions (ops.documents), a token at 0
        sees nothing before it."""
        raise NotImplementedError

    def branch_flops(self) -> float:
        """Floating-point operations a token, forward, beyond products with whole matrices."""
        raise NotImplementedError

    def branch_activations(self) -> float:
        """Numbers a token that a backward pass keeps, estimated."""
        raise NotImplementedError

    def decay_times(self, x_BTD: Tensor) -> Tensor | None:
        """Tokens in which each part of the branch's state falls to 1/e, any shape, with time steps averaged over the
        mixer's input (B, T, D); None where the branch has no such thing."""
        return None

    def joined(self) -> list[Linear]:
        """Linears that multiply this module's input as one matrix, without being called: calibration asks for them."""
        return [self.c_q, self.kv_proj, self.mamba_proj]

    def silencing(self) -> tuple[Tensor, Tensor]:
        """Views of weights without which attention's branch gives zeros, and of those without which the other does."""
        values = self.kv_proj.weight[self.kv_proj.weight.size(0) // 2 :]
        if self.mamba_out_proj is None:
            return values, self.proj.weight[:, self.config.d_model :]
        return values, self.mamba_out_proj.weight

    def forget(self, state: LayerState) -> LayerState:
        """The same state with the recurrent branch's part empty."""
        return state._replace(recurrent=tuple(torch.zeros_like(part) for part in state.recurrent))

    def compact(self, state: LayerState, shift: int | Tensor) -> LayerState:
        """The same state without memory that it only keeps alive, as if its tokens stood `shift` positions lower, (B,)
        where that differs by row."""
        turn = isinstance(shift, Tensor) or shift > 0
        keys = turn_back(state.keys, shift, self.config.resolved_rope_base) if turn else own(state.keys)
        return LayerState(keys, own(state.values), tuple(own(tensor) for tensor in state.recurrent), state.hidden)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: LayerState | None,
        return_state: bool,
        doc_position_BT: Tensor | None = None,
        scale_D: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """x (B, T, D) → (B, T, D), times `scale`, and the layer's new state when asked."""
        kv = self.kv_proj.weight.size(0) // 2
        q_BTD, k_BTC, v_BTC, *inputs = fused_linear(
            x_BTD,
            self.joined(),
            [self.c_q.weight.size(0), kv, kv, *self.widths],
            unit=math.gcd(self.head_dim, *self.widths),
        )
        if self.config.value_gate:
            v_BTC = F.silu(v_BTC)
        past = None if state is None else (state.keys, state.values, state.hidden)
        attended_BTD, (keys, values, hidden) = attention_branch(
            q_BTD,
            k_BTC,
            v_BTC,
            self.q_gain,
            rope,
            head_dim=self.head_dim,
            window=self.window,
            past=past,
            doc_position_BT=doc_position_BT,
            backend=self.runtime.attention_backend,
        )
        recurrent_before = None if state is None else state.recurrent
        y_BTE, recurrent = self.branch(x_BTD, inputs, recurrent_before, return_state, doc_position_BT)
        out_BTD = self.projected(x_BTD, attended_BTD, y_BTE, scale_D)
        return out_BTD, LayerState(keys, values, recurrent, hidden) if return_state else None

    def projected(self, x_BTD: Tensor, attended_BTD: Tensor, y_BTE: Tensor, scale_D: Tensor | None) -> Tensor:
        """The mixer's output (B, T, D), times `scale`, of its input, of attention's output (B, T, D) and the branch's
        (B, T, E)."""
        if scale_D is not None and self.merges_matrices:
            return self.projected_apart(attended_BTD, y_BTE, scale_D)
        scanned_BTD = y_BTE if self.mamba_out_proj is None else self.mamba_out_proj(y_BTE)
        if self.config.branch_norm:
            attended_BTD, scanned_BTD = rms_norm(attended_BTD), rms_norm(scanned_BTD)
        if self.branch_gate is not None:
            attended_BTD, scanned_BTD = self.gated(x_BTD, attended_BTD, scanned_BTD)
        if self.merge_alpha is None:
            out_BTD = self.proj(torch.cat([attended_BTD, scanned_BTD], dim=-1))
        else:
            if is_transformed():
                out_BTD = self.proj(merged(attended_BTD, scanned_BTD, self.merge_alpha))
            else:
                out_BTD = self.proj(Merge.apply(attended_BTD, scanned_BTD, self.merge_alpha, self.head_dim))
        return out_BTD if scale_D is None else out_BTD * scale_D.to(out_BTD.dtype)

    @property
    def merges_matrices(self) -> bool:
        """Whether nothing but matrices and the merge lies between the branches' outputs and the mixer's, and nobody
        wants the matrices' modules to be called."""
        if self.merge_alpha is None or self.branch_gate is not None or self.config.branch_norm:
            return False
        linears = self.proj, cast("Linear", self.mamba_out_proj)
        return not any(not is_plain(linear) or has_hooks(linear) for linear in linears)

    def projected_apart(self, attended_BTD: Tensor, y_BTE: Tensor, scale_D: Tensor) -> Tensor:
        """`projected` by one matrix for each branch, in which the merge, the scale and the branch's two projections
        are multiplied beforehand: as many products with the tokens, and no merge of their results."""
        assert self.merge_alpha is not None
        assert self.mamba_out_proj is not None
        # A branch may have calculated in another dtype than attention.
        dtype, share = y_BTE.dtype, torch.sigmoid(self.merge_alpha)
        scaled = scale_D[:, None] * self.proj.weight
        of_branch = torch.mm((scaled * (1 - share)).to(dtype), self.mamba_out_proj.cast_weight(dtype))
        return F.linear(attended_BTD, (scaled * share).to(attended_BTD.dtype)) + F.linear(y_BTE, of_branch)

    def gated(self, x_BTD: Tensor, attended_BTD: Tensor, scanned_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches' outputs (B, T, D), the recurrent one's (B, T, E) under 'concat', times the gates that the
        first channels of x (B, T, D) open."""
        assert self.branch_gate is not None
        weight = self.branch_gate.to(x_BTD.dtype)
        gate_BTG1 = 2 * torch.sigmoid(F.linear(x_BTD[..., : weight.size(1)], weight))[..., None]
        heads = attended_BTD.size(-1) // self.head_dim
        attention_gate, scan_gate = gate_BTG1.split([heads, gate_BTG1.size(-2) - heads], dim=-2)
        return (
            (attended_BTD.unflatten(-1, (-1, self.head_dim)) * attention_gate).flatten(-2),
            (scanned_BTD.unflatten(-1, (-1, self.head_dim)) * scan_gate).flatten(-2),
        )


def own(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it is a small part of what it keeps in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes else tensor
