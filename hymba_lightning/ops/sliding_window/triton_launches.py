"""Window attention in Triton: launches and the operator around triton_kernels.

B batch, T queries, S keys, H query heads, G kv heads, R = H/G, K head_dim. Nothing is transposed or copied: heads are
read where the projections have them, and no tensor larger than the operands exists.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hymba_lightning.ops.sliding_window.operator import WITH_LOG_SUMS_AND_DOCUMENTS, make_attention_op
from hymba_lightning.ops.sliding_window.triton_kernels import attention_forward, attention_grad_kv, attention_grad_q

LOG2E = math.log2(math.e)
# Zero would make a masked score, minus infinity, no number.
LEAST_SCALE = 1e-30


class Launch(NamedTuple):
    """How a kernel is launched."""

    rows: int
    """Queries of a tile; forward and for the gradient of q those of all its heads."""
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """At most, of a thread; None leaves it to the compiler."""

    def options(self) -> dict[str, Any]:
        """The compiler's."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


class Launches(NamedTuple):
    """Of the three kernels."""

    forward: Launch
    grad_q: Launch
    grad_kv: Launch


def _at_most(registers: int) -> int | None:
    """A limit that lets another program run beside, where the compiler keeps it without spilling: Triton 3.6 and 3.7
    do, 3.9 does not."""
    return registers if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else None


# By the widest head they are for. Those of 64 were the fastest of 50 on an H200 (T 32,768, windows of 512 and 1,024,
# Triton 3.6); those of 128 are chosen by what the compiler says of them, not by measurement: none spills.
LAUNCHES = {
    64: Launches(Launch(64, 64, 4, 2, 128), Launch(64, 64, 4, 2, _at_most(128)), Launch(64, 64, 4, 2, _at_most(168))),
    128: Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(32, 64, 4, 2)),
}
# Query heads of a kv head whose rows share a tile, at most.
MAX_HEADS = 2


def _tiles(x_BTHK: Tensor, rows: int) -> TensorDescriptor:
    """Tiles (1, rows, K) of x as (B, T, H·K)."""
    batch, length, heads, width = x_BTHK.shape
    strides = [x_BTHK.stride(0), x_BTHK.stride(1), 1]
    return TensorDescriptor(x_BTHK, [batch, length, heads * width], strides, [1, rows, width])


def _readable(x_BTHK: Tensor) -> Tensor:
    """x, or a copy if a token's heads are not next to each other or do not begin at multiples of 16 bytes."""
    step = 16 // x_BTHK.element_size()
    aligned = x_BTHK.data_ptr() % 16 == 0 and x_BTHK.stride(0) % step == 0 and x_BTHK.stride(1) % step == 0
    plain = x_BTHK.stride(3) == 1 and x_BTHK.stride(2) == x_BTHK.size(3)
    # A dimension of one entry may have any stride, also one that no tile can have.
    apart = x_BTHK.stride(1) >= x_BTHK.size(2) * x_BTHK.size(3) and x_BTHK.stride(0) >= x_BTHK.stride(1)
    return x_BTHK if aligned and plain and apart else x_BTHK.clone(memory_format=torch.contiguous_format)


class _Call:
    """What the three launches of a call have in common."""

    def __init__(self, q: Tensor, k: Tensor, window: int, scale: float, doc_position: Tensor | None) -> None:
        self.batch, self.n_queries, self.heads, self.width = q.shape
        self.n_keys, self.kv_heads = k.shape[1:3]
        self.window = min(window, self.n_keys)
        self.scale = max(scale, LEAST_SCALE) * LOG2E
        self.launches = next(launches for width, launches in LAUNCHES.items() if self.width <= width)
        # Without documents a pointer that is not read.
        self.doc_position = q if doc_position is None else doc_position.contiguous()
        self.packed = doc_position is not None

    def constants(self, how: Launch) -> dict[str, Any]:
        return {
            "H": self.heads,
            "R": self.heads // self.kv_heads,
            "K": self.width,
            "PACKED": self.packed,
            "KEYS": how.keys,
            **how.options(),
        }

    def over_queries(self, how: Launch) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """The grid of a kernel that goes over the keys of a tile of queries, and its constants."""
        heads = math.gcd(self.heads // self.kv_heads, MAX_HEADS)
        tokens = how.rows // heads
        grid = (triton.cdiv(self.n_queries, tokens), self.heads // heads, self.batch)
        return grid, self.constants(how) | {"TOKENS": tokens, "HEADS": heads}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sums = torch.empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, log_sums
    q, k, v = _readable(q), _readable(k), _readable(v)
    call = _Call(q, k, window, scale, doc_position)
    how = call.launches.forward
    grid, constants = call.over_queries(how)
    with torch.cuda.device_of(q):
        attention_forward[grid](
            q,
            _tiles(k, how.keys),
            _tiles(v, how.keys),
            call.doc_position,
            out,
            log_sums,
            call.n_queries,
            call.n_keys - call.n_queries,
            call.window,
            call.scale,
            *q.stride()[:2],
            **constants,
        )
    return out, log_sums


def _grad_q(
    call: _Call, g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of q, and of each query what the other gradients need (2·B·H, T or up to 3 more)."""
    g_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Rows of tiles begin at multiples of 16 bytes.
    length = triton.cdiv(call.n_queries, 4) * 4
    aside = torch.empty(2 * call.batch * call.heads, length, dtype=torch.float32, device=q.device)
    how = call.launches.grad_q
    grid, constants = call.over_queries(how)
    attention_grad_q[grid](
        q,
        _tiles(k, how.keys),
        _tiles(v, how.keys),
        call.doc_position,
        out,
        g_out,
        log_sums,
        g_q,
        aside,
        call.n_queries,
        length,
        call.n_keys - call.n_queries,
        call.window,
        call.scale,
        *q.stride()[:2],
        *g_out.stride()[:2],
        **constants,
    )
    return g_q, aside


def _grad_kv(
    call: _Call, g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, aside: Tensor, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, the latter `into` a tensor if there is one."""
    g_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    g_v = torch.empty(v.shape, dtype=v.dtype, device=v.device) if into is None else into
    how = call.launches.grad_kv
    attention_grad_kv[(triton.cdiv(call.n_keys, how.keys), call.kv_heads, call.batch)](
        _tiles(q, how.rows),
        _tiles(k, how.keys),
        _tiles(v, how.keys),
        call.doc_position,
        _tiles(g_out, how.rows),
        TensorDescriptor(aside, list(aside.shape), list(aside.stride()), [1, how.rows]),
        g_k,
        g_v,
        call.n_queries,
        call.n_keys,
        call.window,
        call.scale,
        g_v.stride(0),
        V_ROW=g_v.stride(1),
        TOKENS=how.rows,
        **call.constants(how),
    )
    return g_k, g_v


def _backward(
    g_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    window: int,
    scale: float,
    doc_position: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        g_v = v.new_zeros(v.shape) if into is None else into.zero_()
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), k.new_zeros(k.shape), g_v
    g_out, q, k, v = _readable(g_out), _readable(q), _readable(k), _readable(v)
    call = _Call(q, k, window, scale, doc_position)
    with torch.cuda.device_of(q):
        g_q, aside = _grad_q(call, g_out, q, k, v, out, log_sums)
        g_k, g_v = _grad_kv(call, g_out, q, k, v, aside, into)
    return g_q, g_k, g_v


_attention = make_attention_op("sliding_window_triton", _forward, _backward, WITH_LOG_SUMS_AND_DOCUMENTS, into="v")


def sliding_window_attention_triton(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    window: int | None,
    scale: float,
    doc_position_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q·k over the keys seen) v; the window None sees every earlier key."""
    if scale < 0:
        # The kernels take the greatest product for the greatest score.
        q_BTHK, scale = -q_BTHK, -scale
    window = k_BSGK.size(1) if window is None else window
    return _attention(q_BTHK, k_BSGK, v_BSGK, window, scale, doc_position_BT)[0]
