"""The network as a `transformers` model. B rows, T columns (padding included), V vocab_size, D d_model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from hymba_lightning.evaluation.carried import REBASE_AT
from hymba_lightning.generation.rows import join, split
from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.interop.official import is_official
from hymba_lightning.interop.pretrained import (
    ARTIFACT,
    PREFIX,
    WEIGHTS,
    find_folder,
    load_pretrained,
    read_config,
    shared_weights,
)
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState

# Columns read in one forward pass where the cache is kept: the memory's bound.
PIECE_TOKENS = 2048


@dataclass
class HymbaOutput(ModelOutput):
    """Loss in nats a token (where labels were given), logits (B, T, V) float32, and the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HymbaCache | None = None


class HymbaForCausalLM(PreTrainedModel, GenerationMixin):
    """A Hymba whose cache is the network's own state: memory and time per token stay constant.

    Rows of a batch may be padded, on either side: padding is taken off before anything is computed, so that each row
    gets what it would get alone.
    """

    config_class = HymbaPretrainedConfig
    base_model_prefix = "net"
    main_input_name = "input_ids"
    _no_split_modules = ("Block",)
    _is_stateful = True
    supports_gradient_checkpointing = True
    # Weights stay float32 whatever `dtype` says: that is the activations'.
    _keep_in_fp32_modules_strict = ("net",)

    def __init__(self, config: HymbaPretrainedConfig) -> None:
        super().__init__(config)
        network = config.network_config()
        self._tied_weights_keys = {PREFIX + name: PREFIX + source for name, source in shared_weights(network).items()}
        self.net = Hymba(network, config.runtime_config())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the network initialises itself when it is made."""

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.net.tok_emb

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raises ValueError for another size than the present one: the table has a row for each id of the tokenizer."""
        wanted = args[0] if args else kwargs.get("new_num_tokens")
        if wanted not in (None, self.config.vocab_size):
            raise ValueError(
                f"the table has {self.config.vocab_size} rows, one for each piece of its tokenizer: train a network "
                f"with vocab_size={wanted} instead"
            )
        return self.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> HymbaForCausalLM:
        """As of every transformers model. Where the folder has our artifact and no safetensors file, or with
        weights="artifact", the artifact's weights are read; a released Hymba's folder is read as it is."""
        weights = kwargs.pop("weights", None)
        hub = ("revision", "token", "cache_dir", "local_files_only")
        local: dict[str, Any] = {key: kwargs[key] for key in hub if key in kwargs}
        if weights is None and not _is_read_by_us(pretrained_model_name_or_path, local):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        found = load_pretrained(pretrained_model_name_or_path, weights=weights, **local)
        config = kwargs.pop("config", None) or HymbaPretrainedConfig.from_dict(dict(found.extra))
        tensors = {PREFIX + name: value for name, value in found.weights.items()}
        for key in local:
            kwargs.pop(key)
        return super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HymbaCache | None = None,
        past_key_values: HymbaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        last_of_rows: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HymbaOutput | tuple:
        """input_ids (B, T) int64, which follow the cache → logits.

        `attention_mask` (B, T), or (B, columns of the cache + T), is 0 where padding stands, whose logits are 0.
        `last_of_rows` asks for logits (B, 1, V) of each row's last token that is no padding. `labels` (B, T) are
        shifted here and -100 ones left out, as everywhere in transformers. `past_key_values` stands for `cache` too.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None
        mask_BT = _of_new_columns(attention_mask, input_ids)
        if use_cache and cache is not None and self._is_step(input_ids, mask_BT, cache):
            hidden_BTD, cache.columns = cache.step(self.net, input_ids), cache.columns + 1
        else:
            hidden_BTD, state = self._read(input_ids, mask_BT, None if cache is None else cache.state, use_cache)
            if use_cache:
                cache = HymbaCache() if cache is None else cache
                cache.state, cache.columns = state, cache.columns + input_ids.size(1)
        if last_of_rows:
            hidden_BTD = _last_of_rows(hidden_BTD, mask_BT)
        elif not isinstance(logits_to_keep, int):
            hidden_BTD = hidden_BTD[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
        logits = self.net.logits(hidden_BTD).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = HymbaOutput(loss=loss, logits=logits, cache=cache if use_cache else None)
        return out if return_dict is None or return_dict else out.to_tuple()

    def _is_step(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: HymbaCache) -> bool:
        """Whether each row has one more token, and nobody wants its gradient."""
        one = ids_BT.size(1) == 1 and cache.is_initialized and not (self.training or torch.is_grad_enabled())
        return one and (mask_BT is None or bool(mask_BT.all()))

    def _read(
        self, ids_BT: Tensor, mask_BT: Tensor | None, state: HymbaState | None, keep_state: bool
    ) -> tuple[Tensor, HymbaState | None]:
        """Hidden vectors (B, T, D), 0 for padding, and the state of all rows after their last token."""
        ragged = state is not None and isinstance(state.position, Tensor) and ids_BT.size(1) > 1
        if not ragged and (mask_BT is None or bool(mask_BT.all())):
            return self._in_pieces(ids_BT, state) if keep_state else self.net.hidden(ids_BT, state)
        real_BT = torch.ones_like(ids_BT).bool() if mask_BT is None else mask_BT.bool()
        if state is None and not keep_state:
            # Each row's tokens first: causal as the network is, what follows changes nothing before it.
            order_BT = real_BT.logical_not().byte().argsort(dim=1, stable=True)
            hidden_BTD = self.net.hidden(ids_BT.gather(1, order_BT))[0]
            hidden_BTD = hidden_BTD.take_along_dim(order_BT.argsort(dim=1)[..., None], 1)
            return hidden_BTD * real_BT[..., None].to(hidden_BTD.dtype), None
        return self._by_rows(ids_BT, real_BT, state)

    def _by_rows(self, ids_BT: Tensor, real_BT: Tensor, state: HymbaState | None) -> tuple[Tensor, HymbaState]:
        """Each row's tokens by themselves."""
        before: list[HymbaState | None] = [None] * ids_BT.size(0) if state is None else [*split(state)]
        hidden, after = [], []
        for row_T, real_T, own in zip(ids_BT, real_BT, before, strict=True):
            if not real_T.any():
                raise ValueError("a row is all padding: each needs at least one token")
            out_1ND, new = self._in_pieces(row_T[real_T][None], own)
            row_TD = out_1ND.new_zeros(row_T.numel(), out_1ND.size(2))
            hidden.append(row_TD.masked_scatter(real_T[:, None], out_1ND))
            after.append(new)
        return torch.stack(hidden), join(after)

    def _in_pieces(self, ids_BT: Tensor, state: HymbaState | None) -> tuple[Tensor, HymbaState]:
        hidden, after = [], state
        for piece_BT in ids_BT.split(PIECE_TOKENS, dim=1):
            hidden_BTD, new = self.net.hidden(piece_BT, after, return_state=True)
            after = self.net.compact(cast(HymbaState, new), REBASE_AT)
            hidden.append(hidden_BTD)
        return torch.cat(hidden, dim=1), cast(HymbaState, after)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The columns that the cache has not read yet."""
        cache = past_key_values if cache is None else cache
        if use_cache is False:
            cache = None
        elif not isinstance(cache, HymbaCache):
            cache = HymbaCache()
        read = 0 if cache is None else cache.columns
        if read >= input_ids.size(1):
            raise ValueError(f"the cache has read {read} columns, and {input_ids.size(1)} were given: give all of them")
        new_ids = input_ids[:, read:]
        mask = None if attention_mask is None else attention_mask[:, -new_ids.size(1) :]
        return {
            "input_ids": new_ids,
            "attention_mask": mask,
            "cache": cache,
            "use_cache": use_cache,
            "last_of_rows": True,
        }

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None of transformers' own: the first forward pass makes ours."""

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.cache is not None:
            model_kwargs["cache"] = outputs.cache
        return model_kwargs


def _last_of_rows(hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return hidden_BTD[:, -1:]
    last_B = mask_BT.size(1) - 1 - (mask_BT != 0).flip(1).byte().argmax(1)
    return hidden_BTD.take_along_dim(last_B[:, None, None], 1)


def _of_new_columns(mask: Tensor | None, ids_BT: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 2 or mask.size(1) < ids_BT.size(1):
        raise ValueError(
            f"attention_mask must be (batch, columns) with 0 for padding, not {tuple(mask.shape)} for input_ids "
            f"{tuple(ids_BT.shape)}"
        )
    return mask[:, mask.size(1) - ids_BT.size(1) :]


def _is_read_by_us(name: str | Path, hub: dict[str, Any]) -> bool:
    """Whether the folder, or the repository, has our artifact and no safetensors file, or is a released Hymba's."""
    if name is None or not isinstance(name, str | Path):
        return False
    folder = find_folder(name, **hub)
    if is_official(folder):
        return True
    return not (folder / WEIGHTS).is_file() and (folder / ARTIFACT).is_file() and bool(read_config(folder))
