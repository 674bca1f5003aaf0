"""The network as a `transformers` model. B rows, T columns (padding included), V vocab_size, D d_model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from hymba_lightning.hf.backbone import HymbaModel
from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.hf.configuration import HymbaPretrainedConfig
from hymba_lightning.hf.inputs import (
    ALL_PADDING,
    BEGIN,
    checked_ids,
    checked_labels,
    refuse_what_is_not_there,
)


@dataclass
class HymbaOutput(ModelOutput):
    """Loss in nats a token (where labels were given), logits (B, T, V) float32, and the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HymbaCache | None = None


class HymbaForCausalLM(HymbaModel, GenerationMixin):
    """A `HymbaModel` with the network's own head, which continues texts."""

    def forward(  # type: ignore[override] # gives logits
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
        given = past_key_values if cache is None else cache
        input_ids, mask_BT, cache = self._checked(input_ids, attention_mask, given, kwargs)
        if labels is not None:
            labels = checked_labels(labels, input_ids, self.net.config.vocab_size)
            if last_of_rows or not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("labels need every token's logits: leave logits_to_keep and last_of_rows out")
        hidden_BTD, cache = self._advance(input_ids, mask_BT, cache, use_cache)
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
        out = HymbaOutput(loss=loss, logits=logits, cache=cache)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()

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


def without_head(auto: str) -> type:
    """What one of transformers' Auto classes is given in the place of a model that there is not."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{auto} asks for a head that no Hymba has: take AutoModel, whose last_hidden_state a head of your own can "
            "read, or AutoModelForCausalLM"
        )

    refused = {"from_pretrained": staticmethod(refuse), "_from_config": staticmethod(refuse)}
    return type("HymbaWithoutHead", (), {"config_class": HymbaPretrainedConfig} | refused)
