"""The network of the released Hymba models (arXiv:2411.13676; nvidia/Hymba-1.5B-Base and -Instruct).

What differs from ours: one projection makes queries, keys, values and both inputs of the recurrent branch; values are
as wide as that branch asks for; the two branches are normalised, averaged and leave by one projection; norms have
learned weights, also those on the time step, B and C; groups of layers read one layer's keys and values; every token
sees the meta tokens; the MLP is gated. There are no norms or gains on queries and keys, no residual mix, no skips, no
norm on the embedding.

B batch, T new tokens, S keys, M meta tokens, H query heads, G kv heads, K head_dim, V value_dim, E d_inner = H·V,
D d_model.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymba_lightning.model.attention import turn_back
from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import Hymba, HymbaState
from hymba_lightning.model.init import initialise
from hymba_lightning.model.layers import Embedding, Linear
from hymba_lightning.model.mixer import LayerState, own
from hymba_lightning.model.mixers import mamba
from hymba_lightning.model.roles import Module, Role, parameter
from hymba_lightning.ops.prefix_window import prefix_window_attention
from hymba_lightning.ops.rotary_norm.backend_torch import rotate
from hymba_lightning.ops.sliding_window import sliding_window_attention


class RMSNorm(Module):
    """weight · x / sqrt(mean(x²) + eps) over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = parameter(torch.ones(width), Role.CONTROL), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class MLP(Module):
    """W_down (silu(W_gate x) · W_up x)."""

    part = "mlp"

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Linear(d_model, width), Linear(d_model, width), Linear(width, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Seen(NamedTuple):
    """Keys and values that a layer's queries meet: those of the meta tokens, where they are kept apart, then the rest
    in order, the new tokens' last."""

    keys: Tensor  # (B, S, G, K), rotated
    values: Tensor  # (B, S, G, V)
    n_meta: int  # so many of them are seen from anywhere; 0 in a global layer, where all are
    hidden: Tensor | None  # (B,) int64: so many of a row's keys behind the meta tokens are padding


class Mixer(mamba.Mixer):
    """out_proj((norm(attention) + norm(scan)) / 2) of one projection of the input.

    Its state's `recurrent` has, after the convolution's tail and the scan's state, the meta tokens' keys and values in
    a layer with a window. A layer that reads another's keys and values keeps none (P = 0).
    """

    def __init__(self, config: HymbaConfig, runtime: RuntimeConfig, window: int | None, owns_kv: bool) -> None:
        Module.__init__(self)
        self.config, self.window, self.runtime, self.owns_kv = config, window, runtime, owns_kv
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.n_meta = config.meta_tokens if window is not None else 0
        self.widths = self.input_widths(self.given_options())
        d, e, heads = config.d_model, config.d_inner, config.n_kv_heads if owns_kv else 0
        self.sizes = [d, heads * self.head_dim, heads * self.value_dim, *self.widths]
        self.in_proj = Linear(d, sum(self.sizes))
        before = {*self._parameters, *self._modules}
        self.make_branch()
        self.dt_norm = RMSNorm(config.resolved_dt_rank, config.norm_eps)
        self.B_norm, self.C_norm = (RMSNorm(config.d_state, config.norm_eps) for _ in range(2))
        self.branch_names = {*self._parameters, *self._modules} - before
        self.attention_norm, self.scan_norm = (RMSNorm(e, config.norm_eps) for _ in range(2))
        self.out_proj = Linear(e, d)

    def normed_dynamics(self, dt_low_BTR: Tensor, B_BTN: Tensor, C_BTN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_norm(dt_low_BTR), self.B_norm(B_BTN), self.C_norm(C_BTN)

    def scan_input(self, x_BTD: Tensor) -> Tensor:
        return self.in_proj(x_BTD).split(self.sizes, dim=-1)[3]

    def joined(self) -> list[Linear]:
        """None: the one projection is called."""
        return []

    def silencing(self) -> tuple[Tensor, Tensor]:
        return self.attention_norm.weight, self.scan_norm.weight

    def forget(self, state: LayerState) -> LayerState:
        conv, scan, *meta = state.recurrent
        return state._replace(recurrent=(torch.zeros_like(conv), torch.zeros_like(scan), *meta))

    def compact(self, state: LayerState, shift: int | Tensor) -> LayerState:
        conv, scan, *meta = state.recurrent
        keys = [state.keys, *meta[:1]]
        if isinstance(shift, Tensor) or shift > 0:
            # These turn the other way than ours.
            keys = [turn_back(kept, -shift, self.config.resolved_rope_base) for kept in keys]
        else:
            keys = [own(kept) for kept in keys]
        recurrent = (own(conv), own(scan), *keys[1:], *map(own, meta[1:]))
        return LayerState(keys[0], own(state.values), recurrent, state.hidden)

    def forward(  # type: ignore[override] # a layer may read another's keys and values
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: LayerState | None,
        return_state: bool,
        shared: Seen | None = None,
    ) -> tuple[Tensor, LayerState | None, Seen]:
        """x (B, T, D) → (B, T, D), the layer's new state when asked, and the keys and values that it read."""
        q_BTD, k_BTC, v_BTC, *inputs = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        seen = self._seen(k_BTC, v_BTC, rope, state) if shared is None else shared
        attended_BTE = self._attend(rotate(q_BTD.unflatten(-1, (-1, self.head_dim)), *rope), seen)
        before = None if state is None else state.recurrent[:2]
        y_BTE, recurrent = self.branch(x_BTD, inputs, before, return_state, doc_position_BT=None)
        out_BTD = self.out_proj((self.attention_norm(attended_BTE) + self.scan_norm(y_BTE)) / 2)
        return out_BTD, self._state(seen, recurrent) if return_state else None, seen

    def _seen(self, k_BTC: Tensor, v_BTC: Tensor, rope: tuple[Tensor, Tensor], state: LayerState | None) -> Seen:
        """The new tokens' keys and values behind those of the state."""
        k_BTGK = rotate(k_BTC.unflatten(-1, (-1, self.head_dim)), *rope)
        v_BTGV = v_BTC.unflatten(-1, (-1, self.value_dim))
        if state is None:
            return Seen(k_BTGK, v_BTGV, self.n_meta, None)
        meta = state.recurrent[2:]
        keys = torch.cat([*meta[:1], state.keys, k_BTGK], dim=1)
        return Seen(keys, torch.cat([*meta[1:], state.values, v_BTGV], dim=1), self.n_meta, state.hidden)

    def _attend(self, q_BTHK: Tensor, seen: Seen) -> Tensor:
        """Attention's output (B, T, E)."""
        keys, values, n_meta, hidden_B = seen
        backend, scale = self.runtime.attention_backend, self.head_dim**-0.5
        outgrown = self.window is not None and keys.size(1) - n_meta > self.window
        if n_meta and (outgrown or hidden_B is not None):
            assert self.window is not None
            out_BTHV = prefix_window_attention(
                q_BTHK,
                keys,
                values,
                window=self.window,
                prefix=n_meta,
                scale=scale,
                hidden_B=hidden_B,
                backend=backend,
            )
        else:
            # Backends want one width: zeros change neither q·k nor, cut off again, the output.
            widest = max(self.head_dim, self.value_dim)
            q_BTHK, keys, values = (F.pad(x, (0, widest - x.size(-1))) for x in (q_BTHK, keys, values))
            out_BTHV = sliding_window_attention(
                q_BTHK,
                keys,
                values,
                window=self.window if outgrown else None,
                scale=scale,
                hidden_B=hidden_B,
                backend=backend,
            )[..., : self.value_dim]
        return out_BTHV.flatten(-2)

    def _state(self, seen: Seen, recurrent: tuple[Tensor, ...]) -> LayerState:
        keys, values, n_meta, hidden_B = seen
        if not self.owns_kv:
            return LayerState(keys[:, :0], values[:, :0], recurrent)
        n_local = keys.size(1) - n_meta
        dropped = 0 if self.window is None else max(0, n_local - self.window + 1)
        first = n_meta + dropped
        meta = (keys[:, :n_meta], values[:, :n_meta]) if n_meta else ()
        hidden_B = None if hidden_B is None else (hidden_B - dropped).clamp_min(0)
        return LayerState(keys[:, first:], values[:, first:], (*recurrent, *meta), hidden_B)


class Block(Module):
    """x ← x + mixer(norm x); x ← x + mlp(norm x)."""

    def __init__(self, config: HymbaConfig, runtime: RuntimeConfig, window: int | None, owns_kv: bool) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.attn = Mixer(config, runtime, window, owns_kv)
        self.mlp = MLP(config.d_model, config.mlp_hidden)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: LayerState | None,
        return_state: bool,
        shared: Seen | None,
    ) -> tuple[Tensor, LayerState | None, Seen]:
        """x (B, T, D) → x (B, T, D), and what `Mixer` gives beside its output."""
        mixed_BTD, new_state, seen = self.attn(self.attn_norm(x_BTD), rope, state, return_state, shared)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), new_state, seen


class Network(Hymba):
    """Embedding → blocks → learned norm → head, tied or of its own."""

    def __init__(self, config: HymbaConfig, runtime: RuntimeConfig | None = None) -> None:
        Module.__init__(self)
        self.config, self.runtime = config, runtime or RuntimeConfig()
        std = config.tied_embed_std if config.tie_embeddings else 1.0
        self.tok_emb = Embedding(config.vocab_size, config.d_model, std, Role.EMBEDDING)
        self.bigram_hash = self.smeargate = None
        if config.meta_tokens:
            self.meta_tokens = parameter(torch.randn(1, config.meta_tokens, config.d_model) * 0.02, Role.TABLE)
        self.blocks = nn.ModuleList(
            Block(config, self.runtime, config.window_of(layer), owner == layer)
            for layer, owner in enumerate(config.kv_owners)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = (
            None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, zero_init=True, role=Role.HEAD)
        )
        initialise(self, config)

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        return self.norm(hidden_BTD)

    def run_blocks(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: HymbaState | None,
        return_state: bool,
        doc_position_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """Runs all blocks, each with the keys and values of the layer that owns them; documents are never packed."""
        cos, sin = rope
        rope = cos, -sin
        recompute = self.runtime.activation_checkpointing and self.training and torch.is_grad_enabled()
        owners = self.config.kv_owners
        shared: dict[int, Seen] = {}
        new_layers: list[LayerState] = []
        for layer, (block, owner) in enumerate(zip(self.blocks, owners, strict=True)):
            layer_state = None if state is None else state.layers[layer]
            args = (x_BTD, rope, layer_state, return_state, shared.get(owner))
            x_BTD, new_layer, seen = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            if owner in owners[layer + 1 :]:
                shared[owner] = seen
            else:
                shared.pop(owner, None)
            if return_state:
                new_layers.append(cast(LayerState, new_layer))
        return x_BTD, new_layers
