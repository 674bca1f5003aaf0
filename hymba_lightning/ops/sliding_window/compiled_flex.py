"""Sliding-window attention by torch's compiled flex_attention (GPU), with a block mask written down from its formula.

B batch, T queries, S keys, H query heads, G kv heads, K head_dim, Q blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

# Rows and columns of the block mask's blocks.
BLOCK = 128
# Backward's tiles for 16-bit heads of up to 64: 1.27 ms forward and backward where torch's choice takes 1.39 (H100, two
# sequences of 32,768, 8 query and 4 kv heads, window 512).
BACKWARD_TILES = {
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4,
    "bwd_num_stages": 3,
}
# Narrowest heads that flex_attention compiles for.
MIN_HEAD_DIM = 16
# Lengths come rounded, so that only batches, widths, types and modes with and without gradient are left to differ.
MAX_COMPILED_SHAPES = 128


def window_block_mask(n_queries: int, n_keys: int, window: int, device: torch.device) -> BlockMask:
    """The block mask of 0 <= i-j < window, query t at key position i = S-T+t, without ever making the (T, S) mask."""
    offset = n_keys - n_queries
    first_Q1 = offset + torch.arange(0, n_queries, BLOCK, device=device)[:, None]
    last_Q1 = (first_Q1 + BLOCK - 1).clamp(max=n_keys - 1)

    def mask_mod(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        distance = t + offset - j
        return (distance >= 0) & (distance < window)

    shape = n_queries, n_keys
    return _block_mask(first_Q1, last_Q1, first_Q1 - window + 1, last_Q1 - window + 1, shape, mask_mod)


def documents_block_mask(n_keys: int, window: int, doc_position_BT: Tensor) -> BlockMask:
    """The same with documents, also of i-j <= doc_position, for sequences laid end to end: (1, 1, B T, B S).

    One list of blocks, not one for each sequence: flex_attention finds a sequence's list by the stride of a dimension
    of size 1, which torch.compile is free to choose, and reads another's where the mask is made inside a larger graph.
    """
    n_rows, n_queries = doc_position_BT.shape
    offset = n_keys - n_queries
    # No further than a sequence's first key: what lies before it is another's.
    within_T = torch.arange(offset, n_keys, device=doc_position_BT.device)
    reach_N = doc_position_BT.clamp(max=window - 1).minimum(within_T).flatten()
    shape = n_rows * n_queries, n_rows * n_keys
    own_N = torch.arange(shape[0], device=doc_position_BT.device)
    if offset:
        own_N = own_N + (own_N // n_queries + 1) * offset
    behind = -shape[0] % BLOCK
    oldest_QL = F.pad(own_N - reach_N, (0, behind), value=shape[1]).unflatten(0, (-1, BLOCK))
    last_Q1 = F.pad(own_N, (0, behind), value=shape[1] - 1)[BLOCK - 1 :: BLOCK, None]

    def mask_mod(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        distance = t + (t // n_queries + 1) * offset - j if offset else t - j
        return (distance >= 0) & (distance <= reach_N[t])

    least_Q1, greatest_Q1 = oldest_QL.amin(1, keepdim=True), oldest_QL.amax(1, keepdim=True)
    return _block_mask(own_N[::BLOCK, None], last_Q1, least_Q1, greatest_Q1, shape, mask_mod)


def _block_mask(
    first_Q1: Tensor,
    last_Q1: Tensor,
    least_Q1: Tensor,
    greatest_Q1: Tensor,
    shape: tuple[int, int],
    mask_mod: Callable[..., Tensor],
) -> BlockMask:
    """Of queries that each see the keys from an oldest one to their own; neither ever falls from one query to the next.

    A block of keys is needed if it holds one between the oldest key that a query sees and the last query's own. It is
    full, and used without a look at single entries, if every query of a complete block sees its first key and its last.

    Args:
        first_Q1: The first query's own key, of each block of queries.
        last_Q1: The last query's.
        least_Q1: The least of the oldest keys that the queries of a block see.
        greatest_Q1: The greatest.
        shape: How many queries and keys there are.
        mask_mod: flex_attention's own form of the mask.
    """
    start_C = torch.arange(0, shape[1], BLOCK, device=first_Q1.device)
    stop_C = start_C + BLOCK - 1
    needed_QC = (start_C <= last_Q1) & (stop_C >= least_Q1)
    complete_Q1 = torch.arange(BLOCK, shape[0] + BLOCK, BLOCK, device=first_Q1.device)[:, None] <= shape[0]
    full_QC = complete_Q1 & (start_C >= greatest_Q1) & (stop_C <= first_Q1)
    partial = _ordered(needed_QC & ~full_QC)
    full = _ordered(full_QC)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=shape)


def _ordered(wanted_QC: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries wants (1, 1, Q), and which, those first (1, 1, Q, C)."""
    order = torch.argsort(wanted_QC.int(), dim=1, descending=True, stable=True)
    return wanted_QC.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


# Masks of the shapes met lately; training has one, evaluation a few.
_mask_of_shape = functools.lru_cache(maxsize=16)(window_block_mask)
# Masks of a batch's documents, which go with their positions: made for its first layer, of use to the others.
_masks_of_documents: MutableMapping[Tensor, dict[tuple, BlockMask]] = WeakTensorKeyDictionary()


def _cached_block_mask(
    n_queries: int, n_keys: int, window: int, device: torch.device, doc_position_BT: Tensor | None, first: int
) -> BlockMask:
    """The mask of queries that `pad_to_few_shapes` has put `first` others in front of, and some behind."""
    if doc_position_BT is None:
        return _mask_of_shape(n_queries, n_keys, window, device)
    masks = _masks_of_documents.setdefault(doc_position_BT, {})
    shape = n_queries, n_keys, window, first
    if shape not in masks:
        # The others see themselves alone.
        padded_BT = F.pad(doc_position_BT, (first, n_queries - first - doc_position_BT.size(1)))
        masks[shape] = documents_block_mask(n_keys, window, padded_BT)
    return masks[shape]


class UncompiledAttentionError(RuntimeError):
    """flex_attention was about to run uncompiled, which makes every score of a sequence by itself."""


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if not torch.compiler.is_compiling():
        raise UncompiledAttentionError(
            f"sliding_window_attention: torch did not compile flex_attention for q {tuple(q.shape)} and k "
            f"{tuple(k.shape)}, and without that it makes all {q.size(2):,} x {k.size(2):,} scores of each head. Leave "
            "torch.compile switched on (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE); if more than "
            f"{MAX_COMPILED_SHAPES} shapes were compiled in this process, call torch.compiler.reset()"
        )
    return flex_attention(q, k, v, **options)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attention, dynamic=False)


def _call_compiled(*qkv: Tensor, **options: Any) -> Tensor:
    # torch gives up on a function after 8 shapes and would then run it uncompiled.
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
        return _compiled()(*qkv, **options)


def rounded_length(length: int) -> int:
    """The least of 128, 192, 256, 384, 512, 768 … that is at least `length`: two lengths to each doubling."""
    power = max(BLOCK, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > BLOCK and length <= power * 3 // 4 else power


def pad_to_few_shapes(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same attention in one of a few shapes, and the query at which its output (T long) begins.

    Keys that no query sees are cut off. Queries in front make up for keys that fill a part of a window only, so that
    S-T is 0 or window-1; what is added at the end is seen by no earlier query.
    """
    n_queries = q_BTHK.size(1)
    first = 0
    if window is not None:
        k_BSGK, v_BSGK = (x[:, max(0, x.size(1) - n_queries - window + 1) :] for x in (k_BSGK, v_BSGK))
        if k_BSGK.size(1) - n_queries < window - 1:
            first = k_BSGK.size(1) - n_queries
    behind = rounded_length(n_queries + first) - n_queries - first
    k_BSGK, v_BSGK = (F.pad(x, (0, 0, 0, 0, 0, behind)) if behind else x for x in (k_BSGK, v_BSGK))
    return F.pad(q_BTHK, (0, 0, 0, 0, first, behind)) if first + behind else q_BTHK, k_BSGK, v_BSGK, first


def sliding_window_attention_flex(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k over the keys seen) v; the window None sees every earlier key.

    Raises UncompiledAttentionError where torch would compute all T x S scores instead.
    """
    length, head_dim, first = q_BTHK.size(1), q_BTHK.size(3), 0
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q_BTHK, k_BSGK, v_BSGK, first = pad_to_few_shapes(q_BTHK, k_BSGK, v_BSGK, window)
    n_queries, n_keys = q_BTHK.size(1), k_BSGK.size(1)
    n_seen = n_keys if window is None else window
    if doc_position_BT is not None:
        q_BTHK, k_BSGK, v_BSGK = (x.flatten(0, 1)[None] for x in (q_BTHK, k_BSGK, v_BSGK))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    if head_dim < MIN_HEAD_DIM:
        # Zeros add nothing to q·k, and the outputs they stand for are cut off again.
        q, k, v = (F.pad(x, (0, MIN_HEAD_DIM - head_dim)) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    tiles = BACKWARD_TILES if head_dim <= 64 and q.dtype != torch.float32 else None
    options: dict[str, Any] = {"scale": scale, "enable_gqa": grouped, "kernel_options": tiles}
    if not compiling:
        mask = _cached_block_mask(n_queries, n_keys, n_seen, q.device, doc_position_BT, first)
        out = _call_compiled(q, k, v, block_mask=mask, **options)
    else:
        # Part of a larger graph: the few small tensors of the mask are computed there.
        mask = (
            window_block_mask(n_queries, n_keys, n_seen, q.device)
            if doc_position_BT is None
            else documents_block_mask(n_keys, n_seen, doc_position_BT)
        )
        out = flex_attention(q, k, v, block_mask=mask, **options)
    out_BTHK = out.transpose(1, 2)
    if doc_position_BT is not None:
        out_BTHK = out_BTHK[0].unflatten(0, (-1, n_queries))
    return out_BTHK[:, first : first + length, :, :head_dim]
