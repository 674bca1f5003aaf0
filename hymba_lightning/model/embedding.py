"""Token embedding with hashed bigrams and the smear gate. B batch, T sequence, D d_model."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_lightning.model.layers import Embedding, Linear
from hymba_lightning.model.roles import Module, Role, parameter

# Dtypes of token ids. The smaller ones would overflow in the bigram hash.
INTEGERS = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}
# Multiplier of the bigram hash: row = (previous id * 92821 + id) mod buckets.
BIGRAM_MULTIPLIER = 92821


class BigramHash(Module):
    """Embedding of the pair (previous id, id) through a hashed table and a zero-initialised projection."""

    part = "embedding"

    def __init__(self, buckets: int, width: int, d_model: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = Embedding(buckets, width, std=0.01)
        self.proj = Linear(width, d_model, zero_init=True)

    def forward(self, ids_BT: Tensor, previous_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        rows_BT = (previous_ids_BT * BIGRAM_MULTIPLIER + ids_BT) % self.buckets
        return self.proj(self.table(rows_BT).to(dtype))


class SmearGate(Module):
    """g * x_t + (1 - g) * x_{t-1} with g = sigmoid(gate), one gate per channel, starting at 3."""

    part = "embedding"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = parameter(torch.full((d_model,), 3.0), Role.CONTROL)

    def forward(self, x_BTD: Tensor, previous_BTD: Tensor) -> Tensor:
        gate_D = torch.sigmoid(self.gate).to(x_BTD.dtype)
        return gate_D * x_BTD + (1 - gate_D) * previous_BTD


def token_ids(ids_BT: Tensor, name: str) -> Tensor:
    """Token ids (B, T) of any integers as int64. Raises ValueError for anything else, and where there are none."""
    if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or ids_BT.dtype not in INTEGERS or 0 in ids_BT.shape:
        given = f"{tuple(ids_BT.shape)} of {ids_BT.dtype}" if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
        raise ValueError(f"{name} must be integer token ids (sequences, tokens), at least one of each, not {given}")
    return ids_BT.to(torch.int64)


def shift_ids(ids_BT: Tensor, last_B1: Tensor | None, bos_id: int | None) -> Tensor:
    """Each position's previous id: `last_B1` (or 0) for the first; 0 in front of `bos_id` where one is given."""
    first_B1 = torch.zeros_like(ids_BT[:, :1]) if last_B1 is None else last_B1
    previous_BT = torch.cat([first_B1, ids_BT[:, :-1]], dim=1)
    return previous_BT if bos_id is None else previous_BT.masked_fill(ids_BT == bos_id, 0)


def shift_vectors(x_BTD: Tensor, last_B1D: Tensor | None, ids_BT: Tensor, bos_id: int | None) -> Tensor:
    """Each position's previous vector, by the rules of `shift_ids`, zeros where there is none."""
    first_B1D = torch.zeros_like(x_BTD[:, :1]) if last_B1D is None else last_B1D
    previous_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)
    return previous_BTD if bos_id is None else previous_BTD.masked_fill((ids_BT == bos_id)[..., None], 0)


def embed_tokens(
    ids_BT: Tensor,
    tok_emb: Embedding,
    bigram: BigramHash | None,
    smear: SmearGate | None,
    *,
    dtype: torch.dtype,
    bos_id: int | None,
    last_id_B1: Tensor | None = None,
    last_vector_B1D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeds ids (B, T) that follow `last_id` with embedding `last_vector` (or nothing).

    Returns the sequence (B, T, D), not yet normalised, and the last token's vector before smearing (B, 1, D), which the
    next piece of the same sequence needs. With a `bos_id`, nothing reaches across that token.
    """
    try:
        x_BTD = tok_emb(ids_BT).to(dtype)
    except IndexError as error:  # on a CPU; a GPU does not say where
        raise IndexError(f"token ids must be 0 to {tok_emb.num_embeddings - 1} (vocab_size): {error}") from error
    if bigram is not None:
        x_BTD = x_BTD + bigram(ids_BT, shift_ids(ids_BT, last_id_B1, bos_id), dtype)
    last_B1D = x_BTD[:, -1:]
    if smear is not None:
        x_BTD = smear(x_BTD, shift_vectors(x_BTD, last_vector_B1D, ids_BT, bos_id))
    return x_BTD, last_B1D
