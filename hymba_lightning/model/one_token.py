"""One token of generation on a CPU: what the network computes for a token that follows a state, in far fewer calls.

A token's products take microseconds there, and most of an ordinary call's time is spent around them. Here weights are
put together and multiplied with gains beforehand, nothing is checked or recorded for a gradient, and keys and values
are kept in buffers with room for more, instead of being put together anew. The result is the ordinary one to rounding.

B rows, D d_model, E d_inner, N d_state, W d_conv, H query heads, G key/value heads, K head_dim, R = H/G, P kept keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_lightning.model.block import Block
from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.embedding import BIGRAM_MULTIPLIER
from hymba_lightning.model.hymba import Hymba, HymbaState
from hymba_lightning.model.layers import RMS_EPS, is_plain
from hymba_lightning.model.mixer import LayerState
from hymba_lightning.model.mixers import mamba
from hymba_lightning.model.watch import Watch, has_hooks

# Tokens for which a buffer has room until its window's keys are moved to its front.
ROOM = 256
# Weights of larger networks, whose products take most of the time anyway, are not kept twice.
MOST_WEIGHTS = 2**26
# Where modules come from that nobody put in the place of others.
OURS = "hymba_lightning.model."


def serves(net: Hymba) -> bool:
    """Whether `OneToken` can stand for the network: ours with Mamba's scan, in float32 on a CPU, not too large,
    each of its modules as it was made and unwatched by hooks, without gates on its branches or packed documents."""
    config = net.config
    return (
        type(net) is Hymba
        and config.mixer == "mamba"
        and not config.branch_gate
        and not config.packed_documents
        and net.compute_dtype == torch.float32
        and sum(p.numel() for p in net.parameters()) <= MOST_WEIGHTS
        and all(p.device.type == "cpu" and p.dtype == torch.float32 and not p.is_inference() for p in net.parameters())
        and not has_hooks(net)
        and all(type(module).__module__.startswith(OURS) or type(module) is nn.ModuleList for module in net.modules())
        and all(is_plain(module) for module in net.modules() if isinstance(module, nn.Linear))
        and all(type(block) is Block and type(block.attn) is mamba.Mixer for block in net.blocks)
    )


@contextlib.contextmanager
def written_anywhere() -> Iterator[None]:
    """Tensors made here can be written to outside of `torch.inference_mode` too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _root_eps(width: int) -> Tensor:
    """What `_normed` takes for an RMS norm over `width`."""
    return torch.tensor((RMS_EPS * width) ** 0.5)


def _normed(x: Tensor, root_eps: Tensor) -> Tensor:
    """x / sqrt(Σx² + eps) over the last axis: an RMS norm but for a factor, the root of the width."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), root_eps)


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


class _Layer:
    """A block's weights as its step uses them, and its state. `root` is √D, by which what `_normed` gives is short."""

    def __init__(self, block: Block, config: HymbaConfig) -> None:
        mixer: Any = block.attn
        self.config, self.window = config, mixer.window
        root, self.eps, self.head_eps = config.d_model**0.5, _root_eps(config.d_model), _root_eps(config.head_dim)
        self.mix_x, self.mix_x0 = block.resid_mix.unbind()
        # Transposed copies: a row times such a matrix is the fastest product.
        self.w_in = (torch.cat([linear.weight for linear in mixer.joined()]) * root).t().contiguous()
        heads, kv_heads, self.width = config.n_heads, config.n_kv_heads, config.head_dim
        kv = kv_heads * self.width
        self.sizes = [config.d_model + kv, kv, *mixer.widths]
        # Of heads as `_normed` gives them; queries are also multiplied with attention's scale.
        self.gain = torch.cat([mixer.q_gain, torch.full((kv_heads,), self.width**0.5)])[:, None]
        self.conv_weight, self.conv_bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
        self.w_x, self.w_dt = mixer.x_proj.weight.t().contiguous(), mixer.dt_proj.weight.t().contiguous()
        self.dt_bias, self.skip = mixer.dt_proj.bias, mixer.D
        self.rank = self.w_dt.size(0)
        self.A = -mixer.A_log.exp()
        self.w_out = (mixer.proj.weight.t() * block.attn_scale).contiguous()
        if mixer.merge_alpha is None:
            self.w_scan, self.merge = None, None
        else:
            self.w_scan, self.merge = mixer.mamba_out_proj.weight.t().contiguous(), torch.sigmoid(mixer.merge_alpha)
        self.slope = block.mlp.slope
        self.w_up = (block.mlp.fc.weight * root).t().contiguous()
        self.w_down = (block.mlp.proj.weight.t() * block.mlp_scale).contiguous()
        self.heads, self.kv_heads = heads, kv_heads

    def load(self, state: LayerState) -> None:
        """Goes on from `state`."""
        rows, kept = state.keys.shape[:2]
        self.first, self.last = 0, kept
        # (B, G, room, K), so that a head's keys are one matrix.
        with written_anywhere():
            self.keys, self.values = (
                torch.cat([part.transpose(1, 2), part.new_empty(rows, self.kv_heads, ROOM, self.width)], dim=2)
                for part in (state.keys, state.values)
            )
        self.conv, self.scan = state.recurrent

    def state(self) -> LayerState:
        """As the ordinary call has it, its keys and values in the buffers."""
        keys, values = (part[:, :, self.first : self.last].transpose(1, 2) for part in (self.keys, self.values))
        return LayerState(keys, values, (self.conv, self.scan))

    def step(self, x_BD: Tensor, x0_BD: Tensor, cos_K: Tensor, sin_K: Tensor) -> Tensor:
        """(B, D) → (B, D)."""
        x_BD = torch.addcmul(x0_BD * self.mix_x0, x_BD, self.mix_x)
        qk_BX, v_BC, u_BE, z_BE = torch.mm(_normed(x_BD, self.eps), self.w_in).split(self.sizes, dim=-1)
        attended_BD = self._attend(qk_BX, F.silu(v_BC) if self.config.value_gate else v_BC, cos_K, sin_K)
        y_BE = self._scan(u_BE) * F.silu(z_BE)
        if self.w_scan is None or self.merge is None:
            if self.config.branch_norm:
                attended_BD, y_BE = map(_rms_norm, (attended_BD, y_BE))
            merged = torch.cat([attended_BD, y_BE], dim=-1)
        else:
            y_BD = torch.mm(y_BE, self.w_scan)
            if self.config.branch_norm:
                attended_BD, y_BD = map(_rms_norm, (attended_BD, y_BD))
            merged = torch.lerp(y_BD, attended_BD, self.merge)
        x_BD = torch.addmm(x_BD, merged, self.w_out)
        hidden = F.leaky_relu_(torch.mm(_normed(x_BD, self.eps), self.w_up), self.slope).square_()
        return torch.addmm(x_BD, hidden, self.w_down)

    def _attend(self, qk_BX: Tensor, v_BC: Tensor, cos_K: Tensor, sin_K: Tensor) -> Tensor:
        """Attention's output (B, D) of the token's queries and keys (B, (H+G)·K) and its values."""
        rows = qk_BX.size(0)
        heads = _normed(qk_BX.view(rows, -1, self.width), self.head_eps) * self.gain
        heads = torch.addcmul(heads * cos_K, heads.roll(self.width // 2, -1), sin_K)
        if self.last == self.keys.size(2):
            self._make_room()
        self.keys[:, :, self.last] = heads[:, self.heads :]
        self.values[:, :, self.last] = v_BC.view(rows, self.kv_heads, self.width)
        self.last += 1
        queries = heads[:, : self.heads].reshape(rows * self.kv_heads, -1, self.width)
        keys, values = (buffer.flatten(0, 1)[:, self.first : self.last] for buffer in (self.keys, self.values))
        out = torch.bmm(torch.softmax(torch.bmm(queries, keys.transpose(1, 2)), dim=-1), values)
        # The next token does not see the oldest of a whole window.
        if self.window is not None and self.last - self.first >= self.window:
            self.first = self.last - self.window + 1
        return out.view(rows, -1)

    def _make_room(self) -> None:
        kept = self.last - self.first
        with written_anywhere():
            for name in ("keys", "values"):
                buffer = getattr(self, name)
                moved = buffer.new_empty(*buffer.shape[:2], kept + max(ROOM, kept // 2), self.width)
                moved[:, :, :kept] = buffer[:, :, self.first : self.last]
                setattr(self, name, moved)
        self.first, self.last = 0, kept

    def _scan(self, u_BE: Tensor) -> Tensor:
        """The convolution and the scan before its gate (B, E)."""
        inputs_BEW = torch.cat([self.conv, u_BE[..., None]], dim=2)
        self.conv = inputs_BEW[:, :, 1:]
        u_BE = F.silu((inputs_BEW * self.conv_weight).sum(-1) + self.conv_bias)
        dt_low, b_BN, c_BN = torch.mm(u_BE, self.w_x).split([self.rank, self.A.size(1), self.A.size(1)], dim=-1)
        if self.config.dynamics_norm:
            dt_low, b_BN, c_BN = map(_rms_norm, (dt_low, b_BN, c_BN))
        dt_BE = F.softplus(torch.addmm(self.dt_bias, dt_low, self.w_dt))
        decay_BEN = torch.exp_(dt_BE[..., None] * self.A)
        self.scan = torch.addcmul(decay_BEN.mul_(self.scan), (dt_BE * u_BE)[..., None], b_BN[:, None])
        return torch.addcmul(torch.bmm(self.scan, c_BN[..., None])[..., 0], u_BE, self.skip)


class OneToken:
    """Reads tokens one at a time, after the state that was loaded; the network must be one that `serves` allows."""

    def __init__(self, net: Hymba) -> None:
        config = self.config = net.config
        self._watch = Watch(net)
        with torch.no_grad():
            self._layers = [_Layer(block, config) for block in net.layers]
            self._skips = net.skip_weights[0].detach()
            self._table, self._bigram = net.tok_emb.weight.detach(), None
            if net.bigram_hash is not None:
                self._bigram = net.bigram_hash.table.weight.detach(), net.bigram_hash.proj.weight.t().contiguous()
            self._smear = None if net.smeargate is None else torch.sigmoid(net.smeargate.gate)
            half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            frequencies = 1.0 / config.resolved_rope_base**half
            self._frequencies = torch.cat([frequencies, frequencies])
            self._signs = torch.cat([torch.ones_like(half), -torch.ones_like(half)])
        self._root, self._eps = config.d_model**0.5, _root_eps(config.d_model)

    @torch.no_grad()
    def load(self, state: HymbaState) -> bool:
        """Goes on from `state`, which stays as it is; returns whether that is done: not for rows of unequal length, nor
        for what was read in another dtype."""
        if not isinstance(state.position, int) or any(layer.hidden is not None for layer in state.layers):
            return False
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in state.tensors()):
            return False
        for layer, loaded in zip(self._layers, state.layers, strict=True):
            layer.load(loaded)
        self.position, self._last_id, self._last_vector = state.position, state.last_id, state.last_vector[:, 0]
        return True

    @property
    def is_stale(self) -> bool:
        """Whether the network has other weights or modules than when they were copied."""
        return self._watch.is_replaced or self._watch.is_written

    @property
    def rows(self) -> int:
        """B of the state."""
        return self._last_id.size(0)

    def state(self) -> HymbaState:
        """The state after the tokens read so far, its keys and values in memory that goes on being used."""
        layers = [layer.state() for layer in self._layers]
        return HymbaState(layers, self._last_id, self._last_vector[:, None], self.position)

    def hidden(self, ids_B1: Tensor) -> Tensor:
        """Reads a token of each row, (B, 1) int64; returns the last block's output (B, 1, D)."""
        before = [layer.__dict__.copy() for layer in self._layers], self._last_id, self._last_vector
        try:
            return self._read(ids_B1)
        except BaseException:
            # Interrupted in the middle (Ctrl-C): no layer may be a token ahead of others.
            layers, self._last_id, self._last_vector = before
            for layer, values in zip(self._layers, layers, strict=True):
                layer.__dict__.update(values)
            raise

    @torch.no_grad()
    def _read(self, ids_B1: Tensor) -> Tensor:
        x_BD = F.embedding(ids_B1[:, 0], self._table)
        starts = self.config.reset_at_bos and bool((ids_B1 == self.config.bos_id).any())
        before_B1, before_BD = self._last_id, self._last_vector
        if starts:
            at_bos_B1 = ids_B1 == self.config.bos_id
            before_B1, before_BD = before_B1.masked_fill(at_bos_B1, 0), before_BD.masked_fill(at_bos_B1, 0)
        if self._bigram is not None:
            table, projection = self._bigram
            place_B = (before_B1[:, 0] * BIGRAM_MULTIPLIER + ids_B1[:, 0]) % table.size(0)
            x_BD = torch.addmm(x_BD, F.embedding(place_B, table), projection)
        self._last_id, self._last_vector = ids_B1, x_BD
        if self._smear is not None:
            x_BD = torch.lerp(before_BD, x_BD, self._smear)
        x_BD = x0_BD = _normed(x_BD, self._eps) * self._root
        angle_K = self._frequencies * self.position
        cos_K, sin_K = angle_K.cos(), angle_K.sin() * self._signs
        skips: list[Tensor] = []
        n_skips = self._skips.size(0)
        for index, layer in enumerate(self._layers):
            if index >= n_skips and skips:
                x_BD = torch.addcmul(x_BD, self._skips[index - n_skips], skips.pop())
            x_BD = layer.step(x_BD, x0_BD, cos_K, sin_K)
            if index < n_skips:
                skips.append(x_BD)
        self.position += 1
        return x_BD[:, None]
