"""The network as a `transformers` model that gives vectors. B rows, T columns (padding included), D d_model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hymba_lightning.evaluation.carried import REBASE_AT
from hymba_lightning.generation.rows import join, split
from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.folders import check_beside, checked_options, is_read_by_us
from hymba_lightning.hf.inputs import (
    ALL_PADDING,
    checked_cache,
    checked_ids,
    mask_of_new_columns,
    refuse_adapters_of_blocks,
    refuse_adapters_of_rows,
    refuse_other_attention,
    refuse_texts_in_one_row,
    refuse_what_is_not_there,
)
from hymba_lightning.interop.pretrained import (
    PREFIX,
    check_names,
    find_folder,
    generation_settings,
    is_folder,
    load_pretrained,
    shared_weights,
)
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState

# Columns read in one forward pass where the cache is kept: the memory's bound.
PIECE_TOKENS = 2048


@dataclass
class HymbaModelOutput(ModelOutput):
    """What the head reads, (B, T, D) in the compute dtype, 0 for padding, and the cache."""

    last_hidden_state: Tensor | None = None
    cache: HymbaCache | None = None


class HymbaModel(PreTrainedModel):
    """A Hymba whose cache is the network's own state: memory and time per token stay constant. It gives vectors, for
    heads of others.

    Rows of a batch may be padded, on either side: padding is taken off before anything is computed, so that each row
    gets what it would get alone.
    """

    config_class = HymbaPretrainedConfig
    base_model_prefix = "net"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads the class's
    _is_stateful = True
    supports_gradient_checkpointing = True
    # Weights stay float32 whatever `dtype` says: that is the activations'.
    _keep_in_fp32_modules_strict = ["net"]  # noqa: RUF012

    def __init__(self, config: HymbaPretrainedConfig) -> None:
        refuse_other_attention(getattr(config, "_attn_implementation", None))
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Raises ValueError for another size than the present one: the table has a row for each id of the tokenizer."""
        wanted = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != self.config.vocab_size:
            raise ValueError(
                f"the table has {self.config.vocab_size} rows, one for each piece of its tokenizer: train a network "
                f"with vocab_size={wanted} instead"
            )
        return self.get_input_embeddings()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Called by `gradient_checkpointing_enable` and its kin: ours is the runtime's, without their function."""
        self.gradient_checkpointing = enable
        self.net.runtime = dataclasses.replace(self.net.runtime, activation_checkpointing=enable)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> HymbaModel:
        """As of every transformers model. Where the folder has our artifact and no safetensors file, or with
        weights="artifact", the artifact's weights are read; a released Hymba's folder is read as it is.

        Raises FileNotFoundError or ValueError as `interop.pretrained.load_pretrained` does: transformers itself fills
        what a damaged file lacks with whatever lies in memory.
        """
        weights, name = kwargs.pop("weights", None), pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(name, *args, **kwargs)
        kwargs = checked_options(kwargs)
        hub = ("revision", "token", "cache_dir", "local_files_only")
        local: dict[str, Any] = {key: kwargs[key] for key in hub if key in kwargs}
        folder = find_folder(os.fspath(name), **local) / kwargs.get("subfolder", "")
        if weights is None and not is_read_by_us(folder):
            # Other kinds of files (a variant's, another library's) are transformers' affair.
            if is_folder(folder) and not ({"variant", "state_dict", "gguf_file"} & kwargs.keys()):
                check_beside(folder, load_pretrained(folder).extra)
            return super().from_pretrained(name, *args, **kwargs)
        found = load_pretrained(folder, weights=weights)
        check_beside(folder, found.extra)
        config = kwargs.pop("config", None)
        if not isinstance(config, HymbaPretrainedConfig):
            extra = dict(found.extra) if config is None else HymbaPretrainedConfig.get_config_dict(config)[0]
            config, kwargs = HymbaPretrainedConfig.from_dict(extra, return_unused_kwargs=True, **kwargs)
        tensors = {PREFIX + name: value for name, value in found.weights.items()}
        for key in (*local, "subfolder"):
            kwargs.pop(key, None)
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(name)
        if model.can_generate():
            model.generation_config = GenerationConfig(**generation_settings(found.extra))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As of every transformers model. Raises ValueError where a weight is made of others (pruned, parametrized)."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            stored = kwargs.get("state_dict") or self.state_dict()
            check_names(self.config.network_config(), [name.removeprefix(PREFIX) for name in stored])
        return super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HymbaCache | None = None,
        past_key_values: HymbaCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HymbaModelOutput | tuple:
        """input_ids (B, T) int64, which follow the cache → vectors.

        `attention_mask` (B, T), or (B, columns of the cache + T), is 0 where padding stands. `past_key_values` stands
        for `cache` too. Raises ValueError for tokens, a mask or a cache of another kind, shape or range, for several
        texts in one row, and where vectors of layers or attention's weights are asked for.
        """
        given = past_key_values if cache is None else cache
        input_ids, mask_BT, cache = self._checked(input_ids, attention_mask, given, kwargs)
        hidden_BTD, cache = self._advance(input_ids, mask_BT, cache, use_cache)
        out = HymbaModelOutput(last_hidden_state=self.net.normed(hidden_BTD), cache=cache)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()

    def _checked(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Any, asked: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, HymbaCache | None]:
        """Tokens, the mask of their columns and the cache. Raises ValueError as `forward` does."""
        refuse_what_is_not_there(vars(self.config) | asked)
        refuse_adapters_of_blocks(self.net)
        network = self.net.config
        # A look at single tokens, or at a batch of training, would hold a GPU up.
        ids_BT = checked_ids(input_ids, network.vocab_size, look=not self.training)
        cache = checked_cache(cache, ids_BT, network)
        mask_BT = mask_of_new_columns(attention_mask, ids_BT)
        refuse_texts_in_one_row(asked, mask_BT, network)
        return ids_BT, mask_BT, cache

    def _advance(
        self, ids_BT: Tensor, mask_BT: Tensor | None, cache: HymbaCache | None, use_cache: bool | None
    ) -> tuple[Tensor, HymbaCache | None]:
        """Hidden vectors (B, T, D), 0 for padding, and the cache with these tokens; None where none is kept."""
        use_cache = cache is not None if use_cache is None else use_cache
        if use_cache and cache is not None and self._is_step(ids_BT, mask_BT, cache):
            hidden_BTD, cache.columns = cache.step(self.net, ids_BT), cache.columns + 1
            return hidden_BTD, cache
        hidden_BTD, state = self._read(ids_BT, mask_BT, None if cache is None else cache.state, use_cache)
        if not use_cache:
            return hidden_BTD, None
        cache = HymbaCache() if cache is None else cache
        cache.state, cache.columns = state, cache.columns + ids_BT.size(1)
        cache.network = self.net.config
        return hidden_BTD, cache

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
        refuse_adapters_of_rows(self.net)
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
                raise ValueError(ALL_PADDING)
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
