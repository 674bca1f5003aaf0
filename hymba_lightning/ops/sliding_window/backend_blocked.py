"""Sliding-window attention block by block for the CPU: time and memory linear in T, backward recomputes each block.

A block of queries meets the keys from the oldest that one of them sees to its last one's own; a mask cuts out the band
inside, and what is of earlier documents. Work items, one to a thread, are groups of kv heads, so that no two of them
add to the same gradient.

B batch, T queries, S keys, H query heads, G kv heads, R = H/G query heads to a kv head, K head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import HIDDEN, window_mask
from hymba_lightning.ops.sliding_window.operator import make_attention_op
from hymba_lightning.ops.threads import spread_torch

# Queries of a block. Of the scores it computes, a share block/(block + window) lies outside the band.
BLOCK = 128
# Fewer where the window is so long that a block's scores would leave the cache.
MAX_SCORES = 2**19


class _Block(NamedTuple):
    queries: slice
    keys: slice
    mask: Tensor
    """(t, s) zeros, and -inf where a query does not see a key."""


class _Problem:
    """Shapes of one call and its blocks of queries, the same for every head."""

    def __init__(self, q: Tensor, k: Tensor, window: int, doc_position: Tensor | None) -> None:
        self.batch, self.n_queries, heads, self.head_dim = q.shape
        self.n_keys, self.kv_heads = k.shape[1:3]
        self.ratio = heads // self.kv_heads
        self.window = min(window, self.n_keys)
        self.block = min(self.n_queries, max(16, min(BLOCK, MAX_SCORES // (self.window + BLOCK))))
        # Enough items for the threads: a group has as many kv heads as that leaves.
        self.groups = min(self.kv_heads, -(-torch.get_num_threads() // self.batch))
        span = self.window - 1 + self.block
        seen = window_mask(self.block, span, self.window, q.device)
        self.mask = torch.zeros(self.block, span, device=q.device).masked_fill_(~seen, float("-inf"))
        self.first_BT = None
        """The first key of each query's document."""
        if doc_position is not None:
            self.first_BT = torch.arange(self.n_keys - self.n_queries, self.n_keys, device=q.device) - doc_position

    def item(self, number: int) -> tuple[int, slice, slice]:
        """The sequence, the kv heads and the query heads of a work item."""
        b, group = divmod(number, self.groups)
        first, last = (edge * self.kv_heads // self.groups for edge in (group, group + 1))
        return b, slice(first, last), slice(first * self.ratio, last * self.ratio)

    def blocks(self, row: int) -> Iterator[_Block]:
        """Those of a sequence."""
        offset = self.n_keys - self.n_queries
        for start in range(0, self.n_queries, self.block):
            stop = min(start + self.block, self.n_queries)
            oldest = offset + start - self.window + 1
            # The mask is that of a block whose keys all exist; the first ones have none to the left.
            mask = self.mask[: stop - start, max(0, -oldest) : self.window - 1 + stop - start]
            oldest = max(0, oldest)
            if self.first_BT is not None:
                first_T = self.first_BT[row, start:stop]
                skipped = max(0, int(first_T.min()) - oldest)
                oldest, mask = oldest + skipped, mask[:, skipped:]
                if int(first_T.max()) > oldest:
                    j = torch.arange(oldest, offset + stop, device=mask.device)
                    mask = mask.masked_fill(j < first_T[:, None], float("-inf"))
            yield _Block(slice(start, stop), slice(oldest, offset + stop), mask)

    def stack(self, x_THK: Tensor) -> Tensor:
        """(t, g*R, K) -> (g, R*t, K) float32, maybe a view: query heads of a kv head become one matrix's rows."""
        t, heads, head_dim = x_THK.shape
        grouped = x_THK.view(t, heads // self.ratio, self.ratio, head_dim).permute(1, 2, 0, 3)
        return grouped.reshape(-1, self.ratio * t, head_dim).float()

    def unstack(self, x_GRK: Tensor) -> Tensor:
        """The inverse of `stack`."""
        groups, rows, head_dim = x_GRK.shape
        return x_GRK.view(groups, self.ratio, rows // self.ratio, head_dim).permute(2, 0, 1, 3).flatten(1, 2)

    def scores_buffers(self, kv_heads: int, count: int) -> list[Tensor]:
        """Flat memory for `count` score matrices of a block, used again for every block."""
        size = kv_heads * self.ratio * self.mask.numel()
        return list(torch.empty(count, size, device=self.mask.device).unbind(0))

    def probabilities(self, q_GRK: Tensor, k_GSK: Tensor, block: _Block, scores: Tensor, out: Tensor) -> Tensor:
        """softmax of the block's masked scores (g, R*t, s), in the memory of `out`; `scores` is overwritten."""
        torch.bmm(q_GRK, k_GSK.transpose(1, 2), out=scores)
        scores.view(-1, *block.mask.shape).add_(block.mask)
        return torch.softmax(scores, dim=-1, out=out)


def _matrices(buffers: list[Tensor], q_GRK: Tensor, block: _Block) -> list[Tensor]:
    shape = q_GRK.size(0), q_GRK.size(1), block.mask.size(1)
    return [buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in buffers]


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, doc_position: Tensor | None = None) -> Tensor:
    problem = _Problem(q, k, window, doc_position)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def work(number: int) -> None:
        b, kv_heads, heads = problem.item(number)
        buffers = problem.scores_buffers(kv_heads.stop - kv_heads.start, 2)
        for block in problem.blocks(b):
            q_GRK = problem.stack(q[b, block.queries, heads]) * scale
            k_GSK, v_GSK = (x[b, block.keys, kv_heads].transpose(0, 1).float() for x in (k, v))
            scores, p = _matrices(buffers, q_GRK, block)
            problem.probabilities(q_GRK, k_GSK, block, scores, p)
            out[b, block.queries, heads] = problem.unstack(torch.bmm(p, v_GSK)).to(out.dtype)

    spread_torch(work, problem.batch * problem.groups)
    return out


def _backward(
    g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(q, k, window, doc_position)
    g_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Float32 sums with the heads outermost, so that a block's share is added in the matrix product itself.
    shape_BGSK = problem.batch, problem.kv_heads, problem.n_keys, problem.head_dim
    g_k, g_v = torch.zeros(shape_BGSK, device=q.device), torch.zeros(shape_BGSK, device=q.device)

    def work(number: int) -> None:
        b, kv_heads, heads = problem.item(number)
        buffers = problem.scores_buffers(kv_heads.stop - kv_heads.start, 3)
        for block in problem.blocks(b):
            q_GRK = problem.stack(q[b, block.queries, heads]) * scale
            g_GRK = problem.stack(g_out[b, block.queries, heads])
            k_GSK, v_GSK = (x[b, block.keys, kv_heads].transpose(0, 1).float() for x in (k, v))
            scores, p, g_scores = _matrices(buffers, q_GRK, block)
            problem.probabilities(q_GRK, k_GSK, block, scores, p)
            g_v[b, kv_heads, block.keys].baddbmm_(p.transpose(1, 2), g_GRK)
            g_p = torch.bmm(g_GRK, v_GSK.transpose(1, 2), out=scores)
            # p·(g_p − Σ g_p·p) in one pass.
            torch.ops.aten._softmax_backward_data.out(g_p, p, -1, torch.float32, grad_input=g_scores)
            g_k[b, kv_heads, block.keys].baddbmm_(g_scores.transpose(1, 2), q_GRK)
            g_q[b, block.queries, heads] = problem.unstack(torch.bmm(g_scores, k_GSK).mul_(scale)).to(q.dtype)

    spread_torch(work, problem.batch * problem.groups)
    return g_q, g_k.transpose(1, 2).contiguous().to(k.dtype), g_v.transpose(1, 2).contiguous().to(v.dtype)


_attention = make_attention_op("sliding_window_blocked", _forward, _backward)


def sliding_window_attention_blocked(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k) v over the keys seen, float32 inside; the window None sees every earlier key."""
    return _attention(q_BTHK, k_BSGK, v_BSGK, k_BSGK.size(1) if window is None else window, scale, doc_position_BT)


BACKEND = Backend(
    "block by block",
    lambda: sliding_window_attention_blocked,
    devices=("cpu",),
    elsewhere="use backend 'flex' or 'flash'",
    refuses=((lambda call: call.hidden, HIDDEN),),
    auto={"cpu": 10},
)
