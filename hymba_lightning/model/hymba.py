"""The network: embedding → blocks with U-Net skips → softcapped logits.

B batch, T sequence, D d_model, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymba_lightning.model.attention import rope_table, rope_table_of_rows
from hymba_lightning.model.block import Block
from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.embedding import BigramHash, SmearGate, embed_tokens, token_ids
from hymba_lightning.model.init import initialise
from hymba_lightning.model.layers import Embedding, Linear, rms_norm, table_of
from hymba_lightning.model.mixer import LayerState, own
from hymba_lightning.model.mixers import network_class
from hymba_lightning.model.roles import Module, Role, parameter
from hymba_lightning.ops.documents import document_positions
from hymba_lightning.ops.registry import check_name
from hymba_lightning.ops.scaled_sum import scaled_sum
from hymba_lightning.ops.softcapped_cross_entropy import softcapped_cross_entropy

# Far from any id.
NO_TARGET = -(2**62)


def _pretrained() -> Any:
    # Above this layer, where artifacts are read; and nothing of it belongs to the code that a score is made with.
    return importlib.import_module("hymba_lightning.interop.pretrained")


class HymbaState(NamedTuple):
    """What the network remembers of a sequence's earlier tokens: constant in size unless a layer is global."""

    layers: list[LayerState]
    last_id: Tensor  # (B, 1) the last token, for the bigram hash
    last_vector: Tensor  # (B, 1, D) its embedding before smearing
    position: int | Tensor  # rotary position of the next token, (B,) int64 where it differs by row
    doc_tokens: Tensor | None = None  # (B,) int32 tokens so far of the last document, where documents are packed

    def tensors(self) -> list[Tensor]:
        """All tensors of it, those of a layer one after another; each has the batch first."""
        own = [tensor for layer in self.layers for tensor in (layer.keys, layer.values, *layer.recurrent, layer.hidden)]
        return [tensor for tensor in (*own, self.last_id, self.last_vector, self.doc_tokens) if tensor is not None]


class Hymba(Module):
    """A Hymba language model. Raises ValueError where its mixer does not have the sizes or options of the config.

    A mixer's file may have a network of its own, a subclass `Network`, which is then what is made.
    """

    # `hidden` and `logits` are called too.
    is_always_called = False

    def __new__(cls, config: HymbaConfig | None = None, *args: Any, **kwargs: Any) -> Hymba:
        # Copies and pickles make an object of the class that they know, without arguments.
        made = cls if config is None or cls is not Hymba else network_class(config.mixer) or cls
        return super().__new__(made)

    def __init__(self, config: HymbaConfig, runtime: RuntimeConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.runtime = runtime or RuntimeConfig()
        for field in dataclasses.fields(self.runtime):
            if "op" in field.metadata:
                check_name(field.metadata["op"], getattr(self.runtime, field.name))
        d, n_layers = config.d_model, config.n_layers
        std = config.tied_embed_std if config.tie_embeddings else 1.0
        self.tok_emb = Embedding(config.vocab_size, d, std, Role.EMBEDDING)
        self.bigram_hash = BigramHash(config.bigram_buckets, config.bigram_dim, d) if config.bigram_hash else None
        self.smeargate = SmearGate(d) if config.smear_gate else None
        self.n_skips = n_layers // 2
        self.skip_weights = parameter(torch.ones(1, self.n_skips, d), Role.CONTROL)
        if config.meta_tokens:
            self.meta_tokens = parameter(torch.randn(1, config.meta_tokens, d) * 0.02, Role.TABLE)
        blocks: list[Block] = []
        for layer in range(n_layers):
            leader = layer - layer % config.kv_share_every
            shared = blocks[leader].attn.kv_proj if leader != layer else None
            blocks.append(Block(config, self.runtime, config.window_of(layer), shared))
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = None if config.tie_embeddings else Linear(d, config.vocab_size, zero_init=True, role=Role.HEAD)
        initialise(self, config)

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        return cast("list[Block]", list(self.blocks))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return getattr(torch, self.runtime.compute_dtype)

    def compact(self, state: HymbaState, rebase_at: int) -> HymbaState:
        """The same state without memory that it only keeps alive; from position `rebase_at` on as if it stood at 0:
        attention sees differences of positions only."""
        shift = state.position if int(torch.as_tensor(state.position).max()) >= rebase_at else 0
        layers = [block.attn.compact(layer, shift) for block, layer in zip(self.layers, state.layers, strict=True)]
        return HymbaState(layers, own(state.last_id), own(state.last_vector), state.position - shift, state.doc_tokens)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Writes config.json and weights for Hugging Face's libraries: `interop.pretrained.save_pretrained`."""
        return _pretrained().save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Hymba:
        """The network of a folder or a repository of the hub: `interop.pretrained.from_pretrained`."""
        return _pretrained().from_pretrained(name, **options)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Saves and uploads it as owner/name, and returns the URL: `interop.pretrained.push_network`."""
        return _pretrained().push_network(self, repository, **options)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        state: HymbaState | None = None,
        return_state: bool = False,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, HymbaState]:
        """inputs (B, T) integers → logits (B, T, V), or with targets (B, T) the cross-entropy in nats.

        The loss is float32: a scalar for reduction 'mean' or 'sum', (B, T) for 'none'; any other raises ValueError, and
        so do targets of another shape than inputs. `state` continues an earlier call on the same sequences;
        `return_state` adds the new state to the result.
        """
        if targets is not None:
            inputs, targets = token_ids(inputs, "inputs"), token_ids(targets, "targets")
            if targets.shape != inputs.shape:
                raise ValueError(
                    f"targets {tuple(targets.shape)} must have one token for each of inputs {tuple(inputs.shape)}"
                )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
        hidden_BTD, new_state = self.hidden(inputs, state, return_state)
        if targets is None:
            out = self.logits(hidden_BTD)
        else:
            nats_N = self.nats(self.raw_logits(hidden_BTD).flatten(0, 1), targets.flatten())
            out = nats_N.view_as(targets) if reduction == "none" else getattr(nats_N, reduction)()
        return out if new_state is None else (out, new_state)

    def nats(self, raw_logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Cross-entropy (N,) float32 of logits before the softcap."""
        cap = self.config.logit_softcap
        if not cap:
            # torch's own -100 would leave targets out of the sum, and not out of the mean.
            return F.cross_entropy(raw_logits_NV.float(), targets_N, reduction="none", ignore_index=NO_TARGET)
        return softcapped_cross_entropy(raw_logits_NV, targets_N, cap=cap, backend=self.runtime.loss_backend)

    def raw_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of the last block's output (B, T, D) before the softcap, in the compute dtype."""
        normed_BTD = self.normed(hidden_BTD)
        if self.lm_head is not None:
            return self.lm_head(normed_BTD)
        return F.linear(normed_BTD, table_of(self.tok_emb).to(normed_BTD.dtype))

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        """What the first block reads of the embedded tokens (B, T, D)."""
        return rms_norm(embedded_BTD)

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """The last block's output (B, T, D), normalised, which the head reads."""
        return rms_norm(hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Softcapped logits (B, T, V) of the last block's output (B, T, D), in the compute dtype."""
        cap, logits_BTV = self.config.logit_softcap, self.raw_logits(hidden_BTD)
        return cap * torch.tanh(logits_BTV / cap) if cap else logits_BTV

    def hidden(
        self, inputs: Tensor, state: HymbaState | None = None, return_state: bool = False
    ) -> tuple[Tensor, HymbaState | None]:
        """inputs (B, T) → the last block's output (B, T, D) and, when asked, the state after the last token.

        Raises ValueError for inputs that are no token ids, or a state of another number of sequences."""
        inputs = token_ids(inputs, "inputs")
        if state is not None and state.last_id.size(0) != inputs.size(0):
            raise ValueError(
                f"the state is of {state.last_id.size(0)} sequences and inputs {tuple(inputs.shape)} of "
                f"{inputs.size(0)}: continue the sequences that it was made of"
            )
        x_BTD, last_vector = embed_tokens(
            inputs,
            self.tok_emb,
            self.bigram_hash,
            self.smeargate,
            dtype=self.compute_dtype,
            bos_id=self.config.bos_id if self.config.reset_at_bos else None,
            last_id_B1=None if state is None else state.last_id,
            last_vector_B1D=None if state is None else state.last_vector,
        )
        x_BTD = self.enter(x_BTD)
        n_meta = self.config.meta_tokens if state is None else 0
        if n_meta:
            x_BTD = torch.cat([self.meta_tokens.to(x_BTD.dtype).expand(x_BTD.size(0), -1, -1), x_BTD], dim=1)
        first = 0 if state is None else state.position
        head_dim, base = self.config.head_dim, self.config.resolved_rope_base
        if isinstance(first, Tensor):
            rope = rope_table_of_rows(first, x_BTD.size(1), head_dim, base)
        else:
            rope = rope_table(first, x_BTD.size(1), head_dim, base, x_BTD.device)
        doc_position_BT = None
        if self.config.packed_documents:
            earlier_B = None if state is None else state.doc_tokens
            doc_position_BT = document_positions(inputs, self.config.bos_id, earlier_B)
        x_BTD, layers = self.run_blocks(x_BTD, rope, state, return_state, doc_position_BT)
        if n_meta:
            x_BTD = x_BTD[:, n_meta:]
        if not return_state:
            return x_BTD, None
        doc_tokens_B = None if doc_position_BT is None else doc_position_BT[:, -1] + 1
        return x_BTD, HymbaState(layers, inputs[:, -1:], last_vector, first + n_meta + inputs.size(1), doc_tokens_B)

    def run_blocks(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        state: HymbaState | None,
        return_state: bool,
        doc_position_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """Runs all blocks; each block of the second half first adds the weighted output of its mirror in the first."""
        x0_BTD = x_BTD
        skips: list[Tensor] = []
        new_layers = []
        recompute = self.runtime.activation_checkpointing and self.training and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            if index >= self.n_skips and skips:
                skip_weight_D = self.skip_weights[0, index - self.n_skips].to(x_BTD.dtype)
                x_BTD, _ = scaled_sum(x_BTD, skips.pop(), None, skip_weight_D)
            layer_state = None if state is None else state.layers[index]
            args = (x_BTD, x0_BTD, rope, layer_state, return_state, doc_position_BT)
            x_BTD, new_layer = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            if index < self.n_skips:
                skips.append(x_BTD)
            if return_state:
                new_layers.append(new_layer)
        return x_BTD, new_layers


def outline(config: HymbaConfig) -> Hymba:
    """The network of a config without memory for its weights: names, shapes, roles. Leaves the random state alone."""
    with torch.device("meta"):
        return Hymba(config)
