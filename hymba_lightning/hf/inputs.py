"""What a call of the transformers model is given: checked, and what cannot be read is named with the remedy.

B rows, T columns (padding included).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from hymba_lightning.hf.cache import HymbaCache
from hymba_lightning.model import HymbaConfig

BEGIN = "a text begins with the document start, which the tokenizer adds unless add_special_tokens is false"
ALL_PADDING = "a row is all padding: each needs at least one token"
# What peft gives its layers by hooks, for the time of a call.
TOLD_BY_PEFT = {"adapter_names", "alora_offsets"}
# Of labels, where none is wanted.
IGNORED = -100


def refuse_what_is_not_there(asked: dict[str, Any]) -> None:
    """Raises ValueError for options of other models, given to a call or set in a config."""
    if asked.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds cannot be read, since bigrams are looked up by id: give input_ids (methods of peft that put "
            "vectors in front of a text are not for this network: take one that adapts its matrices, such as LoRA)"
        )
    if asked.get("output_hidden_states"):
        raise ValueError("output_hidden_states is not offered: put a forward hook on the blocks of model.net.blocks")
    if asked.get("output_attentions"):
        raise ValueError("output_attentions is not offered: attention's weights are never made as a matrix")


def refuse_other_attention(name: Any) -> None:
    """Raises ValueError for the attention of another library."""
    if name not in (None, "eager"):
        raise ValueError(
            f"attn_implementation={name!r} is not offered: attention has kernels of its own here, of which the fastest "
            "that runs is taken; leave it out, or name one by runtime={'attention_backend': …}"
        )


def refuse_adapters_of_blocks(net: Any) -> None:
    """Raises ValueError where what stands in the place of the network, a block or a mixer has not their methods."""
    try:
        for block in net.blocks:
            block.attn.compact  # noqa: B018 - whether it is there
    except AttributeError as error:
        raise ValueError(
            "an adapter stands in the place of a whole block or network (peft's target_parameters A_log, resid_mix or "
            "skip_weights): adapt parameters of single projections, such as c_q.weight, or train those whole"
        ) from error


def refuse_adapters_of_rows(net: nn.Module) -> None:
    """Raises ValueError where peft tells layers something of each row, or of its last columns: padding is taken off
    before they are called."""
    for module in net.modules():
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "keywords", {}).keys() & TOLD_BY_PEFT:
                raise ValueError(
                    "adapter_names and aLoRA's invocation tokens are told by row and column, and padding is taken off: "
                    "give rows of one length without padding, or one row at a time"
                )


def checked_ids(ids_BT: Any, vocab_size: int, *, look: bool) -> Tensor:
    """Tokens as int64. Raises ValueError where they are none; a GPU's are only looked at if `look` says so."""
    if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.is_floating_point() or ids_BT.is_complex():
        what = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
        kind = f"{what} of {ids_BT.dtype}" if isinstance(ids_BT, Tensor) else what
        raise ValueError(
            f"input_ids must be a tensor of token ids, (batch, tokens), not {kind}: give what "
            '`tokenizer(texts, return_tensors="pt")` has under that name'
        )
    if not ids_BT.numel():
        raise ValueError(f"input_ids has no tokens ({tuple(ids_BT.shape)}): {BEGIN}")
    if ids_BT.device.type == "cpu" or (ids_BT.is_cuda and look):
        low, high = (int(end) for end in ids_BT.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids has the id {low if low < 0 else high}, and the network's vocab_size is {vocab_size}: use "
                "the tokenizer that lies beside it"
            )
    return ids_BT.long()


def checked_labels(labels_BT: Any, ids_BT: Tensor, vocab_size: int) -> Tensor:
    """Labels as int64. Raises ValueError where they are not one for each token; values are looked at on a CPU."""
    if not isinstance(labels_BT, Tensor) or labels_BT.shape != ids_BT.shape or labels_BT.is_floating_point():
        what = tuple(labels_BT.shape) if isinstance(labels_BT, Tensor) else type(labels_BT).__name__
        raise ValueError(
            f"labels must be token ids as input_ids are, {tuple(ids_BT.shape)}, with {IGNORED} where none is wanted, "
            f"not {what}{f' of {labels_BT.dtype}' if isinstance(labels_BT, Tensor) else ''}"
        )
    labels_BT = labels_BT.long()
    wanted = labels_BT[labels_BT != IGNORED] if labels_BT.device.type == "cpu" else labels_BT.new_empty(0)
    wrong = wanted[(wanted < 0) | (wanted >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"labels have the id {int(wrong[0])}, and the network's vocab_size is {vocab_size}: what is not to be "
            f"learned is {IGNORED}"
        )
    return labels_BT


def checked_cache(cache: Any, ids_BT: Tensor, network: HymbaConfig) -> HymbaCache | None:
    """The cache; None for one of another class that has read nothing, such as libraries make for every model.

    Raises ValueError for another class's that has, another network's, or one of another number of rows.
    """
    if cache is None or (isinstance(cache, Cache) and not isinstance(cache, HymbaCache) and not cache.get_seq_length()):
        return None
    if not isinstance(cache, HymbaCache):
        raise ValueError(
            f"a {type(cache).__name__} is no cache of a Hymba's, which is a state: give the one that an earlier call "
            "returned (of peft's methods those that train prefixes are not for this network)"
        )
    if cache.is_initialized and cache.batch_size != ids_BT.size(0):
        raise ValueError(f"input_ids has {ids_BT.size(0)} rows, and its cache {cache.batch_size}: give the same ones")
    if cache.is_initialized and cache.network not in (None, network):
        raise ValueError("the cache is that of a network of another config: give one that this model returned")
    return cache


def mask_of_new_columns(mask: Any, ids_BT: Tensor) -> Tensor | None:
    """The mask (B, T) of the columns that are given now. Raises ValueError where it is none."""
    if mask is None:
        return None
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or mask.size(0) != ids_BT.size(0)
        or mask.size(1) < ids_BT.size(1)
    ):
        raise ValueError(
            f"attention_mask must be (batch, columns) with 0 for padding, not {shape} for input_ids "
            f"{tuple(ids_BT.shape)}"
        )
    return mask[:, mask.size(1) - ids_BT.size(1) :]


def refuse_texts_in_one_row(asked: dict[str, Any], mask_BT: Tensor | None, network: HymbaConfig) -> None:
    """Raises ValueError where positions start again within a row, by which other models tell its texts apart.

    With `packed_documents` the network tells them apart itself, by the document starts.
    """
    positions, ends, numbers = (asked.get(name) for name in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    several = (isinstance(ends, Tensor) and ends.numel() > 2) or (isinstance(numbers, Tensor) and bool(numbers.any()))
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.size(1) > 1:
        again = positions[:, 1:] <= positions[:, :-1]
        if mask_BT is not None and mask_BT.shape[1] == positions.size(1):
            again = again & (mask_BT[:, 1:] != 0) & (mask_BT[:, :-1] != 0)
        several = several or bool(again.any())
    if several and not network.packed_documents:
        raise ValueError(
            "several texts lie in one row (by position_ids that start again, cu_seq_lens_q or seq_idx), and would read "
            "one another: give each a row of its own (a collator that pads), or train a network with packed_documents"
        )
