"""A Newton-Schulz step in Triton: launches. n matrices, R rows, C columns.

Of the two square products, which are symmetric, only the blocks on and below the diagonal are computed.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_lightning.ops.newton_schulz.triton_kernels import bank_product

# Rows and columns of a program's block, and the inner elements of one turn.
BLOCK, BLOCK_K = 128, 64
SMALLEST_BLOCK = 16
# Two programs of 8 warps fill a multiprocessor at 128 registers a thread.
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": 128, "enable_fp_fusion": True}
SMALL_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def _block(size: int, largest: int) -> int:
    return min(largest, max(SMALLEST_BLOCK, triton.next_power_of_2(size)))


def _product(left: Tensor, right: Tensor, added: Tensor | None, alpha: float, beta: float, symmetric: bool) -> Tensor:
    """alpha · left right + beta · added, (n, R, C); `right` may be a transposed view, the others are contiguous."""
    n, rows, inner = left.shape
    columns = right.size(2)
    out = torch.empty(n, rows, columns, dtype=left.dtype, device=left.device)
    block, block_k = _block(min(rows, columns), BLOCK), _block(inner, BLOCK_K)
    masked = rows % block != 0 or columns % block != 0 or inner % block_k != 0
    grid = (triton.cdiv(rows, block) * triton.cdiv(columns, block), n)
    with torch.cuda.device_of(left):
        bank_product[grid](
            left,
            right,
            left if added is None else added,
            out,
            rows,
            columns,
            inner,
            right.stride(1),
            right.stride(2),
            alpha,
            beta,
            SYMMETRIC=symmetric,
            ADDS=added is not None,
            MASKED=masked,
            BLOCK=block,
            BLOCK_K=block_k,
            **(OPTIONS if block == BLOCK else SMALL_OPTIONS),
        )
    return out


def newton_schulz_step_triton(x_nRC: Tensor, a: float, b: float, c: float) -> Tensor:
    """a X + b (X Xᵀ) X + c (X Xᵀ)² X, its two square products rounded to the bank's dtype."""
    x_nRC = x_nRC.contiguous()
    gram_nRR = _product(x_nRC, x_nRC.mT, None, 1.0, 0.0, symmetric=True)
    poly_nRR = _product(gram_nRR, gram_nRR, gram_nRR, c, b, symmetric=True)
    return _product(poly_nRR, x_nRC, x_nRC, 1.0, a, symmetric=False)
