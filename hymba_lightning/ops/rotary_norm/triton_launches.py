"""The heads' norm, gain and turn in Triton: launches and the operator around triton_kernels.

B batch, T sequence, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_lightning.ops.rotary_norm.operator import make_rotary_op
from hymba_lightning.ops.rotary_norm.triton_kernels import norm_and_turn, norm_and_turn_backward
from hymba_lightning.ops.triton_launch import COMPILE_OPTIONS
from hymba_lightning.ops.triton_sums import sum_channels

# Numbers of a tile, and its warps: the fastest of 21 forward and 18 backward on an H200 at the training shapes.
FORWARD = (1024, 2)
BACKWARD = (4096, 8)
# Programs of the backward kernel, each of which leaves a part of the gain's sums: as many as a Hopper holds at once.
TARGET_PROGRAMS = 528


def _tokens_apart(x_BTHK: Tensor) -> Tensor:
    """`x` where a token's heads lie side by side in memory, else a contiguous copy."""
    width = x_BTHK.size(3)
    apart = x_BTHK.stride(3) == 1 and (x_BTHK.stride(2) == width or x_BTHK.size(2) == 1)
    return x_BTHK if apart else x_BTHK.contiguous()


def _forward(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    batch, length, heads, width = x.shape
    x, cos, sin = _tokens_apart(x), cos.contiguous(), sin.contiguous()
    out = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device)
    tile, warps = FORWARD
    rows = max(1, tile // width)
    with torch.cuda.device_of(x):
        norm_and_turn[(triton.cdiv(length * heads, rows) * batch,)](
            x,
            x if gain is None else gain.contiguous(),
            cos,
            sin,
            out,
            batch,
            length,
            x.stride(0),
            eps,
            X_ROW=x.stride(1),
            COS_ROW=cos.stride(0),
            SIN_ROW=sin.stride(0),
            H=heads,
            HALF=width // 2,
            HAS_GAIN=gain is not None,
            ROWS=rows,
            **COMPILE_OPTIONS | {"num_warps": warps},
        )
    return out


def _backward(
    g_out: Tensor,
    x: Tensor,
    gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x.shape
    g_out, x, cos, sin = _tokens_apart(g_out), _tokens_apart(x), cos.contiguous(), sin.contiguous()
    g_x = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device) if into is None else into
    g_gain = torch.empty(0 if gain is None else heads, dtype=x.dtype if gain is None else gain.dtype, device=x.device)
    padded = triton.next_power_of_2(heads)
    tile, warps = BACKWARD
    rows = max(padded, tile // width)
    of_sequence = min(triton.cdiv(length * padded, rows), max(1, TARGET_PROGRAMS // batch))
    programs = of_sequence * batch
    parts = torch.empty((programs if gain is not None else 0, 1, heads), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        norm_and_turn_backward[(programs,)](
            g_out,
            x,
            x if gain is None else gain.contiguous(),
            cos,
            sin,
            g_x,
            parts,
            batch,
            length,
            of_sequence * rows,
            g_out.stride(0),
            x.stride(0),
            g_x.stride(0),
            eps,
            G_ROW=g_out.stride(1),
            X_ROW=x.stride(1),
            TO_ROW=g_x.stride(1),
            COS_ROW=cos.stride(0),
            SIN_ROW=sin.stride(0),
            H=heads,
            HEADS=padded,
            HALF=width // 2,
            HAS_GAIN=gain is not None,
            ROWS=rows,
            **COMPILE_OPTIONS | {"num_warps": warps},
        )
        if gain is not None:
            sum_channels(parts, g_gain, g_gain)
    return g_x, g_gain


rotary_norm_triton_op = make_rotary_op("rotary_norm_triton", _forward, _backward, into="x")
