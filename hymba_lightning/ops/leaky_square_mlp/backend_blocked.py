"""The MLP on a CPU, a block of tokens at a time, so that what lies between its products stays in the cache.

N tokens, D width, F hidden width, R tokens of a block. A work item, one to a thread, is a share of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.operators import Contract, make_operator
from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.threads import spread_torch

# Hidden activations of a block.
BLOCK = 2**18


def _blocks(item: int, items: int, count: int, hidden: int) -> Iterator[slice]:
    size = max(16, BLOCK // hidden)
    first, last = (count * edge // items for edge in (item, item + 1))
    return (slice(start, min(start + size, last)) for start in range(first, last, size))


def _forward(x_ND: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    count, hidden = x_ND.size(0), w_in_FD.size(0)
    out_ND = torch.empty((count, w_out_DF.size(0)), dtype=x_ND.dtype)
    a_NF = torch.empty((count, hidden), dtype=x_ND.dtype)
    items = torch.get_num_threads()

    def work(item: int) -> None:
        for block in _blocks(item, items, count, hidden):
            torch.mm(x_ND[block], w_in_FD.t(), out=a_NF[block])
            torch.mm(F.leaky_relu(a_NF[block], slope).square_(), w_out_DF.t(), out=out_ND[block])

    spread_torch(work, items)
    return out_ND, a_NF


def _backward(
    g_ND: Tensor, x_ND: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, a_NF: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    count, hidden = a_NF.shape
    g_x_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype)
    items = torch.get_num_threads()
    g_in, g_out = (torch.zeros((items, *w.shape), dtype=w.dtype) for w in (w_in_FD, w_out_DF))

    def work(item: int) -> None:
        for block in _blocks(item, items, count, hidden):
            leaky_RF = F.leaky_relu(a_NF[block], slope)
            g_RF = torch.mm(g_ND[block], w_out_DF).mul_(leaky_RF)
            torch.ops.aten.leaky_relu_backward.grad_input(g_RF, a_NF[block], slope, False, grad_input=g_RF)
            g_out[item].addmm_(g_ND[block].t(), leaky_RF.square_())
            g_in[item].addmm_(g_RF.t(), x_ND[block], alpha=2.0)
            torch.mm(g_RF, w_in_FD, out=g_x_ND[block]).mul_(2.0)

    spread_torch(work, items)
    g_w_in_FD, g_w_out_DF = (g[0] if items == 1 else g.sum(0) for g in (g_in, g_out))
    return g_x_ND, g_w_in_FD, g_w_out_DF


_mlp = make_operator(
    "leaky_square_mlp_blocked",
    Contract(
        operands="Tensor x, Tensor w_in, Tensor w_out, float slope",
        results="out a",
        n_differentiable=1,
        kept="x w_in w_out a slope",
        gradients="x w_in w_out",
    ),
    _forward,
    _backward,
    lambda x, w_in, w_out, slope: (x.new_empty(len(x), len(w_out)), x.new_empty(len(x), len(w_in))),
)


def leaky_square_mlp_blocked(x: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float) -> Tensor:
    """x (..., D) → (..., D)."""
    return _mlp(x.reshape(-1, x.size(-1)), w_in_FD, w_out_DF, slope)[0].view(x.shape)


BACKEND = Backend(
    "block by block",
    lambda: leaky_square_mlp_blocked,
    devices=("cpu",),
    elsewhere="use 'torch'",
    refuses=((lambda call: call.half_precision, "its sums over blocks would lose digits in 16 bits: use 'torch'"),),
    auto={"cpu": 20},
)
