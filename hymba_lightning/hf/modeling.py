"""The network as a `transformers` model. B rows, T columns (padding included), V vocab_size, D d_model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from hymba_lightning.evaluation.carried import REBASE_AT
from hymba_lightning.generation.rows import join, split
from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.folders import check_beside, checked_options, is_read_by_us
from hymba_lightning.hf.inputs import (
    ALL_PADDING,
    BEGIN,
    checked_cache,
    checked_ids,
    checked_labels,
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
    ) -> HymbaForCausalLM:
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

        Raises ValueError for tokens, labels, a mask or a cache of another kind, shape or range, for several texts in
        one row, and where vectors of layers or attention's weights are asked for.
        """
        refuse_what_is_not_there(vars(self.config) | kwargs)
        refuse_adapters_of_blocks(self.net)
        network = self.net.config
        # A look at single tokens, or at a batch of training, would hold a GPU up.
        input_ids = checked_ids(input_ids, network.vocab_size, look=not self.training)
        cache = checked_cache(past_key_values if cache is None else cache, input_ids, network)
        if use_cache is None:
            use_cache = cache is not None
        mask_BT = mask_of_new_columns(attention_mask, input_ids)
        refuse_texts_in_one_row(kwargs, mask_BT, network)
        if labels is not None:
            labels = checked_labels(labels, input_ids, network.vocab_size)
            if last_of_rows or not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("labels need every token's logits: leave logits_to_keep and last_of_rows out")
        if use_cache and cache is not None and self._is_step(input_ids, mask_BT, cache):
            hidden_BTD, cache.columns = cache.step(self.net, input_ids), cache.columns + 1
        else:
            hidden_BTD, state = self._read(input_ids, mask_BT, None if cache is None else cache.state, use_cache)
            if use_cache:
                cache = HymbaCache() if cache is None else cache
                cache.state, cache.columns = state, cache.columns + input_ids.size(1)
                cache.network = network
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
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()

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

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of every transformers model. Raises ValueError for prompts that are no tensor of tokens."""
        given = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(given, Tensor) and not given.numel():
            raise ValueError(f"the prompt has no tokens: {BEGIN}")
        if given is not None:
            checked_ids(given, self.config.vocab_size, look=True)
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError, as `generate_batch` does by it: what is cached here has no pages to share out."""
        raise ValueError(
            "continuous batching needs a cache of keys in pages, and this network's is a state: give `generate` the "
            "prompts as one padded batch"
        )

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

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """None of transformers' own: the first forward pass makes ours. One that is given may be older than weights."""
        refuse_what_is_not_there(vars(generation_config))
        for given in (model_kwargs.get("cache"), model_kwargs.get("past_key_values")):
            if isinstance(given, HymbaCache):
                given.renew()

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        cache = cast(HymbaOutput, outputs).cache
        if cache is not None:
            model_kwargs["cache"] = cache
        return model_kwargs


def _last_of_rows(hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return hidden_BTD[:, -1:]
    if not bool((mask_BT != 0).any(1).all()):
        raise ValueError(ALL_PADDING)
    last_B = mask_BT.size(1) - 1 - (mask_BT != 0).flip(1).byte().argmax(1)
    return hidden_BTD.take_along_dim(last_B[:, None, None], 1)
