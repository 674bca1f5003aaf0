"""Triton kernels of window attention for Hopper: a forward pass, the gradient of q, and those of k and v.

Each is one loop over the tiles of the band; only tiles that its edges cross are masked. Scores are to base 2, so that
exponentials take no factor of their own. Where several query heads share a kv head, a row of a tile is a query of one
of HEADS heads, those of a token next to each other: keys and values are loaded once for all of them, and a tile of few
tokens wastes little of the band's edges. Tiles of the loops are read by the tensor memory accelerator, which gives
zeros for what lies outside a tensor.

B batch, T queries, S keys, H query heads, G kv heads, R = H/G query heads to a kv head, K head_dim. Query t stands at
key position offset + t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hymba_lightning.ops.triton_math import LN2, LOG2E

# Stands for the greatest of no scores: finite, so that its difference from a masked score is no NaN.
LOWEST = tl.constexpr(-1e30)
# Earlier tokens of its document where a query has no position: more than there can be.
ENDLESS = tl.constexpr(2**30)


@triton.jit
def oldest_keys(doc_position, token, T, offset, window, PACKED: tl.constexpr):
    """The first key that each of the queries sees; `doc_position` points to those of its sequence."""
    position = offset + token
    oldest = tl.maximum(position - window + 1, 0)
    if PACKED:
        oldest = tl.maximum(oldest, position - tl.load(doc_position + token, mask=token < T, other=ENDLESS))
    return oldest


@triton.jit
def rows_of(x, x_batch, x_token, first, T, TOKENS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr):
    """Pointers to a tile's rows (TOKENS·HEADS, K) of a (B, T, H, K) tensor with a token's heads next to each other, and
    which of them exist. Grid axes 1 and 2 are groups of HEADS heads, and the batch."""
    row = tl.arange(0, TOKENS * HEADS)
    token, head = first + row // HEADS, tl.program_id(1) * HEADS + row % HEADS
    x += tl.program_id(2).to(tl.int64) * x_batch
    where = x + (token.to(tl.int64) * x_token + head * K)[:, None] + tl.arange(0, K)[None, :]
    return where, (token < T)[:, None]


@triton.jit
def numbers_of(numbers, first, length, H, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """The same for one number of each query, a (B, H, length) tensor."""
    row = tl.arange(0, TOKENS * HEADS)
    token, head = first + row // HEADS, tl.program_id(1) * HEADS + row % HEADS
    return numbers + (tl.program_id(2).to(tl.int64) * H + head) * length + token, token < length


@triton.jit
def attention_forward(
    q,
    k_tiles,
    v_tiles,
    doc_position,
    out,
    log_sums,
    T,
    offset,
    window,
    scale,
    q_batch,
    q_token,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out (B, T, H, K), contiguous, and log Σ exp of each query's scores (B, H, T). `scale` is to base 2.
    Grid (T/TOKENS, H/HEADS, B)."""
    ROWS: tl.constexpr = TOKENS * HEADS
    first = tl.program_id(0) * TOKENS
    batch, column = tl.program_id(2), tl.program_id(1) * HEADS // R * K
    token = first + tl.arange(0, ROWS) // HEADS
    position = offset + token
    oldest = oldest_keys(doc_position + batch.to(tl.int64) * T, token, T, offset, window, PACKED)
    lowest, highest = tl.min(oldest, 0), tl.max(oldest, 0)
    where, exists = rows_of(q, q_batch, q_token, first, T, TOKENS, HEADS, K)
    queries = tl.load(where, mask=exists, other=0.0)
    greatest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, K], tl.float32)
    # From the queries' own keys backwards.
    stop = offset + first + TOKENS
    for tile in range(tl.cdiv(stop - lowest, KEYS)):
        start = stop - (tile + 1) * KEYS
        keys = k_tiles.load([batch, start, column]).reshape(KEYS, K)
        values = v_tiles.load([batch, start, column]).reshape(KEYS, K)
        scores = tl.dot(queries, keys.T)
        if (start + KEYS > offset + first + 1) | (start < highest):
            key = start + tl.arange(0, KEYS)[None, :]
            scores = tl.where((key <= position[:, None]) & (key >= oldest[:, None]), scores, float("-inf"))
        greater = tl.maximum(greatest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - greater[:, None])
        kept = tl.exp2(greatest - greater)
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
        greatest = greater
    where, exists = rows_of(out, T * H * K, H * K, first, T, TOKENS, HEADS, K)
    tl.store(where, (sums / total[:, None]).to(out.dtype.element_ty), mask=exists)
    where, exists = numbers_of(log_sums, first, T, H, TOKENS, HEADS)
    tl.store(where, (greatest + tl.log2(total)) * LN2, mask=exists)


@triton.jit
def attention_grad_q(
    q,
    k_tiles,
    v_tiles,
    doc_position,
    out,
    g_out,
    log_sums,
    g_q,
    aside,
    T,
    length,
    offset,
    window,
    scale,
    q_batch,
    q_token,
    g_batch,
    g_token,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """g_q (B, T, H, K), contiguous, and `aside` (2, B, H, length) for the other kernel: of each query log Σ exp to base
    2, and g_out · out; zeros for what is beyond the last. Grid (T/TOKENS, H/HEADS, B)."""
    ROWS: tl.constexpr = TOKENS * HEADS
    first = tl.program_id(0) * TOKENS
    batch, column = tl.program_id(2), tl.program_id(1) * HEADS // R * K
    token = first + tl.arange(0, ROWS) // HEADS
    position = offset + token
    oldest = oldest_keys(doc_position + batch.to(tl.int64) * T, token, T, offset, window, PACKED)
    lowest, highest = tl.min(oldest, 0), tl.max(oldest, 0)
    where, exists = rows_of(g_out, g_batch, g_token, first, T, TOKENS, HEADS, K)
    gradients = tl.load(where, mask=exists, other=0.0)
    where, exists = rows_of(out, T * H * K, H * K, first, T, TOKENS, HEADS, K)
    outputs = tl.load(where, mask=exists, other=0.0)
    product = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
    where, exists = numbers_of(log_sums, first, T, H, TOKENS, HEADS)
    log_sum = tl.load(where, mask=exists, other=0.0) * LOG2E
    where, exists = numbers_of(aside, first, length, H, TOKENS, HEADS)
    tl.store(where, log_sum, mask=exists)
    tl.store(where + tl.num_programs(2).to(tl.int64) * H * length, product, mask=exists)
    where, exists = rows_of(q, q_batch, q_token, first, T, TOKENS, HEADS, K)
    queries = tl.load(where, mask=exists, other=0.0)
    sums = tl.zeros([ROWS, K], tl.float32)
    stop = offset + first + TOKENS
    for tile in range(tl.cdiv(stop - lowest, KEYS)):
        start = stop - (tile + 1) * KEYS
        keys = k_tiles.load([batch, start, column]).reshape(KEYS, K)
        values = v_tiles.load([batch, start, column]).reshape(KEYS, K)
        scores = tl.dot(queries, keys.T)
        if (start + KEYS > offset + first + 1) | (start < highest):
            key = start + tl.arange(0, KEYS)[None, :]
            scores = tl.where((key <= position[:, None]) & (key >= oldest[:, None]), scores, float("-inf"))
        weights = tl.exp2(scores * scale - log_sum[:, None])
        g_scores = weights * (tl.dot(gradients, values.T) - product[:, None])
        sums = tl.dot(g_scores.to(keys.dtype), keys, sums)
    where, exists = rows_of(g_q, T * H * K, H * K, first, T, TOKENS, HEADS, K)
    tl.store(where, (sums * (scale * LN2)).to(g_q.dtype.element_ty), mask=exists)


@triton.jit
def attention_grad_kv(
    q_tiles,
    k_tiles,
    v_tiles,
    doc_position,
    g_tiles,
    aside_tiles,
    g_k,
    g_v,
    T,
    S,
    window,
    scale,
    g_v_batch,
    V_ROW: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """g_k (B, S, G, K), contiguous, and g_v, of which a token's heads are. Grid (S/KEYS, G, B): a program goes over the
    queries of all R heads.

    What is beyond the last query is all zeros, which adds nothing.
    """
    start, group, batch = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    offset = S - T
    key = start + tl.arange(0, KEYS)
    keys = k_tiles.load([batch, start, group * K]).reshape(KEYS, K)
    values = v_tiles.load([batch, start, group * K]).reshape(KEYS, K)
    sums_k = tl.zeros([KEYS, K], tl.float32)
    sums_v = tl.zeros([KEYS, K], tl.float32)
    doc_position += batch.to(tl.int64) * T
    # Rows of numbers are read from multiples of 16 bytes.
    begin = tl.maximum(start - offset, 0) // 4 * 4
    end = tl.minimum(start + KEYS + window - 1 - offset, T)
    for turn in range(tl.cdiv(tl.maximum(end - begin, 0), TOKENS) * R):
        first, head = begin + turn // R * TOKENS, turn % R
        queries = q_tiles.load([batch, first, (group * R + head) * K]).reshape(TOKENS, K)
        gradients = g_tiles.load([batch, first, (group * R + head) * K]).reshape(TOKENS, K)
        token = first + tl.arange(0, TOKENS)
        scores = tl.dot(keys, queries.T)
        crossed = (offset + first < start + KEYS - 1) | (offset + first + TOKENS > start + window)
        if crossed | PACKED:
            oldest = oldest_keys(doc_position, token, T, offset, window, PACKED)
            seen = (key[:, None] <= offset + token[None, :]) & (key[:, None] >= oldest[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        row = batch * H + group * R + head
        log_sum = aside_tiles.load([row, first]).reshape(TOKENS)
        weights = tl.exp2(scores * scale - log_sum[None, :])
        sums_v = tl.dot(weights.to(gradients.dtype), gradients, sums_v)
        g_weights = tl.dot(values, gradients.T)
        product = aside_tiles.load([row + tl.num_programs(2) * H, first]).reshape(TOKENS)
        g_scores = weights * (g_weights - product[None, :])
        sums_k = tl.dot(g_scores.to(queries.dtype), queries, sums_k)
    where = ((batch.to(tl.int64) * S + key) * (H // R) + group)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(where + g_k, (sums_k * (scale * LN2)).to(g_k.dtype.element_ty), mask=(key < S)[:, None])
    where = (batch.to(tl.int64) * g_v_batch + key.to(tl.int64) * V_ROW + group * K)[:, None] + tl.arange(0, K)[None, :]
    tl.store(where + g_v, sums_v.to(g_v.dtype.element_ty), mask=(key < S)[:, None])
