"""Batches of sequences that differ in length: padding taken off, and their states put together and taken apart.

Nothing is ever read from padding: rows of one length are read together, and their states are joined for what follows.
B rows, T tokens, P kept keys.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from hymba_lightning.evaluation.carried import read
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.model.mixer import LayerState


def row_lengths(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """First token (B,) and number of tokens (B,) of each row of a mask that is not 0 where a token stands.

    Raises ValueError for a row with padding on both sides or between tokens, or with no token.
    """
    if mask_BT.dim() != 2:
        raise ValueError(f"a mask of padding is (batch, tokens), not {tuple(mask_BT.shape)}")
    real_BT = mask_BT != 0
    first_B, length_B = real_BT.long().argmax(1), real_BT.sum(1)
    place_T = torch.arange(mask_BT.size(1), device=mask_BT.device)
    expected_BT = (place_T >= first_B[:, None]) & (place_T < (first_B + length_B)[:, None])
    at_an_end_B = (first_B == 0) | (first_B + length_B == mask_BT.size(1))
    wrong = (~((expected_BT == real_BT).all(1) & at_an_end_B & (length_B > 0))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} of the mask is not one run of tokens with padding on one side: pad rows on the left or on "
            "the right, and leave none empty"
        )
    return first_B, length_B


def without_padding(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    """The rows' tokens. Raises ValueError as `row_lengths` does."""
    first_B, length_B = row_lengths(mask_BT)
    starts, lengths = first_B.tolist(), length_B.tolist()
    return [row[start : start + n] for row, start, n in zip(ids_BT.tolist(), starts, lengths, strict=True)]


def prompt_rows(prompts: list[list[int]] | Tensor, mask: Tensor | None, vocab_size: int) -> list[list[int]]:
    """The tokens of prompts: sequences of integers, or a tensor (B, T) with a mask (B, T) of its padding.

    Raises ValueError for what is none of these, a prompt without tokens, or an id that is not under `vocab_size`.
    """
    if isinstance(prompts, Tensor):
        mask = torch.ones_like(prompts) if mask is None else mask
        if prompts.dim() != 2 or mask.shape != prompts.shape:
            raise ValueError(
                f"prompts {tuple(prompts.shape)} and mask {tuple(mask.shape)} must both be (prompts, tokens)"
            )
        prompts = without_padding(prompts, mask)
    elif mask is not None:
        raise ValueError("a mask is for a tensor of prompts: lists hold no padding")
    try:
        rows = [list(map(operator.index, row.tolist() if hasattr(row, "tolist") else row)) for row in prompts]
    except TypeError as error:
        raise ValueError(
            f"each prompt is a list of token ids: encode texts with the tokenizer first ({error})"
        ) from None
    if not rows or not all(rows):
        raise ValueError("each prompt needs at least one token: begin with the document start (BOS)")
    wrong = next((token for row in rows for token in (min(row), max(row)) if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"a prompt has the id {wrong}, and the network's vocab_size is {vocab_size}: use its tokenizer"
        )
    return rows


def read_rows(
    net: Hymba, rows: list[Tensor], states: list[HymbaState | None], piece_tokens: int
) -> tuple[Tensor, list[HymbaState]]:
    """Feeds each row (n,), n >= 1, which follows its own state of one row or nothing.

    Rows of one length that begin are read together. Returns the last tokens' logits (B, V) and each row's state.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (row, state) in enumerate(zip(rows, states, strict=True)):
        groups[row.numel(), -1 if state is None else index].append(index)
    logits: dict[int, Tensor] = {}
    after: dict[int, HymbaState] = {}
    for members in groups.values():
        group_BV, state = read(net, torch.stack([rows[index] for index in members]), states[members[0]], piece_tokens)
        for index, row_V, own in zip(members, group_BV, split(state), strict=True):
            logits[index], after[index] = row_V, own
    return torch.stack([logits[index] for index in range(len(rows))]), [after[index] for index in range(len(rows))]


def join(states: Iterable[HymbaState]) -> HymbaState:
    """One state of all rows of `states`, in order. Rows that kept fewer keys than others get padding that hides."""
    states = list(states)
    if len(states) == 1:
        return states[0]
    positions = [state.position for state in states]
    if any(isinstance(position, Tensor) for position in positions) or len(set(positions)) > 1:
        position: int | Tensor = torch.cat([_of_rows(state) for state in states])
    else:
        position = positions[0]
    return HymbaState(
        [_join_layer(list(layers)) for layers in zip(*(state.layers for state in states), strict=True)],
        torch.cat([state.last_id for state in states]),
        torch.cat([state.last_vector for state in states]),
        position,
        None if states[0].doc_tokens is None else torch.cat([cast(Tensor, state.doc_tokens) for state in states]),
    )


def split(state: HymbaState) -> list[HymbaState]:
    """The rows' states, each with the keys that it really has."""
    return [select(state, [row]) for row in range(state.last_id.size(0))]


def select(state: HymbaState, rows: list[int] | Tensor) -> HymbaState:
    """The state of some rows, which may come more than once, without padding that none of them needs."""
    index = torch.as_tensor(rows, device=state.last_id.device)
    position = state.position
    if isinstance(position, Tensor):
        position = position[index]
        if bool((position == position[0]).all()):
            position = int(position[0])
    return HymbaState(
        [_select_layer(layer, index) for layer in state.layers],
        state.last_id[index],
        state.last_vector[index],
        position,
        None if state.doc_tokens is None else state.doc_tokens[index],
    )


def _of_rows(state: HymbaState) -> Tensor:
    if isinstance(state.position, Tensor):
        return state.position
    return torch.full((state.last_id.size(0),), state.position, device=state.last_id.device)


def _join_layer(layers: list[LayerState]) -> LayerState:
    most = max(layer.keys.size(1) for layer in layers)
    hidden = None
    if any(layer.keys.size(1) < most or layer.hidden is not None for layer in layers):
        hidden = torch.cat([most - layer.keys.size(1) + _hidden_of_rows(layer) for layer in layers])
    return LayerState(
        torch.cat([_padded(layer.keys, most) for layer in layers]),
        torch.cat([_padded(layer.values, most) for layer in layers]),
        tuple(torch.cat(parts) for parts in zip(*(layer.recurrent for layer in layers), strict=True)),
        hidden,
    )


def _hidden_of_rows(layer: LayerState) -> Tensor:
    if layer.hidden is not None:
        return layer.hidden
    return torch.zeros(layer.keys.size(0), dtype=torch.int64, device=layer.keys.device)


def _padded(kept_BPGK: Tensor, most: int) -> Tensor:
    """Zeros in front, so that the last key stays the last."""
    missing = most - kept_BPGK.size(1)
    if not missing:
        return kept_BPGK
    return torch.cat([kept_BPGK.new_zeros(kept_BPGK.size(0), missing, *kept_BPGK.shape[2:]), kept_BPGK], dim=1)


def _select_layer(layer: LayerState, index: Tensor) -> LayerState:
    keys, values, hidden = layer.keys[index], layer.values[index], layer.hidden
    if hidden is not None:
        hidden = hidden[index]
        spare = int(hidden.min())
        keys, values, hidden = keys[:, spare:], values[:, spare:], hidden - spare
        if not hidden.any():
            hidden = None
    return LayerState(keys, values, tuple(tensor[index] for tensor in layer.recurrent), hidden)
