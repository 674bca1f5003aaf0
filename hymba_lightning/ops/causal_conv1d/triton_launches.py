"""The causal depthwise convolution in Triton: launches and the operator around triton_kernels.

B batch, T sequence, E channels, W taps (d_conv).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_lightning.ops.causal_conv1d.operator import last_inputs, make_conv_op
from hymba_lightning.ops.causal_conv1d.triton_kernels import conv_backward, conv_forward
from hymba_lightning.ops.triton_launch import COMPILE_OPTIONS, readable
from hymba_lightning.ops.triton_sums import sum_channels

# Programs that a launch should have: some 30 for each of a large GPU's multiprocessors.
TARGET_PROGRAMS = 4096
# Tokens of a tile: more of them re-read less of the W-1 neighbours, and take more registers.
ROWS = 16
# Channels of a program of one warp: two or four for each thread, loaded together.
FORWARD_BLOCK_E = 128
BACKWARD_BLOCK_E = 64


def tiles_per_program(batch: int, length: int, channels: int, block: int) -> int:
    """Tiles that one program walks over: as many as leave TARGET_PROGRAMS programs."""
    programs = batch * triton.cdiv(channels, block) * triton.cdiv(length, ROWS)
    return max(1, programs // TARGET_PROGRAMS)


def _forward(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    silu: bool,
    initial_state_BEW1: Tensor,
    doc_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x_BTE.shape
    taps = weight_EW.size(1)
    x = readable(x_BTE)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = tiles_per_program(batch, length, channels, FORWARD_BLOCK_E)
    grid = (triton.cdiv(channels, FORWARD_BLOCK_E), triton.cdiv(length, tiles * ROWS), batch)
    with torch.cuda.device_of(x):
        conv_forward[grid](
            x,
            weight_EW.contiguous(),
            bias_E.contiguous(),
            initial_state_BEW1.contiguous(),
            # Without documents a pointer that is not read.
            x if doc_position is None else doc_position.contiguous(),
            out,
            length,
            tiles,
            x.stride(0),
            E=channels,
            W=taps,
            X_ROW=x.stride(1),
            SILU=silu,
            PACKED=doc_position is not None,
            ROWS=ROWS,
            BLOCK_E=FORWARD_BLOCK_E,
            **COMPILE_OPTIONS,
        )
    return out, last_inputs(x, initial_state_BEW1).contiguous()


def _backward(
    g_out: Tensor,
    g_final: Tensor,
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    silu: bool,
    initial_state_BEW1: Tensor,
    doc_position: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x_BTE.shape
    taps = weight_EW.size(1)
    x, g_out, initial = readable(x_BTE), readable(g_out), initial_state_BEW1.contiguous()
    tiles = tiles_per_program(batch, length, channels, BACKWARD_BLOCK_E)
    spans = triton.cdiv(length, tiles * ROWS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    dinitial = torch.empty(initial.shape, dtype=initial.dtype, device=x.device)
    sums = torch.empty(batch * spans, taps + 1, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_backward[triton.cdiv(channels, BACKWARD_BLOCK_E), spans, batch](
            x,
            weight_EW.contiguous(),
            bias_E.contiguous(),
            initial,
            x if doc_position is None else doc_position.contiguous(),
            g_out,
            dx,
            dinitial,
            sums,
            length,
            tiles,
            x.stride(0),
            g_out.stride(0),
            dx.stride(0),
            E=channels,
            W=taps,
            X_ROW=x.stride(1),
            DOUT_ROW=g_out.stride(1),
            DX_ROW=dx.stride(1),
            SILU=silu,
            PACKED=doc_position is not None,
            ROWS=ROWS,
            BLOCK_E=BACKWARD_BLOCK_E,
            **COMPILE_OPTIONS,
        )
        d_weight, d_bias = (torch.empty(w.shape, dtype=w.dtype, device=x.device) for w in (weight_EW, bias_E))
        sum_channels(sums, d_weight, d_bias)
    # The state after the sequence is its last W-1 inputs, and what is left of the state before it if it is shorter.
    kept = min(length, taps - 1)
    dx[:, length - kept :] += g_final[:, :, taps - 1 - kept :].transpose(1, 2)
    dinitial[:, :, kept:] += g_final[:, :, : taps - 1 - kept]
    return dx, d_weight, d_bias, dinitial


causal_conv1d_triton_op = make_conv_op("causal_conv1d_triton", _forward, _backward, into="x")
