"""The selective scan in Triton: shapes, launches and the operator around the kernels of triton_forward and _backward.

B batch, T sequence, E channels, N states per channel. Three launches forward (each chunk's end from a zero state, the
carry across chunks, outputs), five backward (the same for the adjoints, then all gradients, then the sums of what the
programs found), so that the time axis of few long sequences fills the device. Operands are read where they lie, with
any stride over batch and time, but for the small B and C, which are laid out anew for each direction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba_lightning.ops.selective_scan.operator import ScanOperands, make_scan_op
from hymba_lightning.ops.selective_scan.triton_backward import chunk_adjoints, chunk_gradients
from hymba_lightning.ops.selective_scan.triton_forward import carry_chunks, chunk_ends, chunk_outputs
from hymba_lightning.ops.triton_launch import COMPILE_OPTIONS, can_prefetch, multiprocessors, readable
from hymba_lightning.ops.triton_sums import sum_channels, sum_pairs

# Tokens of a tile: those that a thread holds in registers, and the distance of the states saved for backward.
ROWS = 8
# Channels of a program, two for each thread, one in chunk_gradients, whose two warps share a sum over channels.
FORWARD_BLOCK_E = 64
BLOCK_E = 64
GRADIENT_WARPS = 2
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# States of a turn of the lighter kernels' loop where N is even: so many chains of multiplications run side by side.
TOGETHER = 2
# Below this a chunk's edge costs more than the parallelism gains.
MIN_CHUNK_TILES = 8
# Chunks whose edges the carry loads at once, and channels of one of its programs: one for each thread.
CARRY_AHEAD = 16
CARRY_BLOCK_E = 32
# Programs of a launch for each multiprocessor, which holds 24 of chunk_outputs' and 8 of chunk_gradients' at once:
# chunks are as long as that leaves no last round of a few programs.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 24, 32
# Registers of a thread that chunk_gradients may take: the most with which a multiprocessor holds 16 of its warps.
BACKWARD_REGISTERS = 128
# States below which the matrix units' smallest product is not filled.
FEW_STATES = 16


def tiles_per_chunk(batch: int, length: int, n_blocks: int, programs: int) -> int:
    """Tiles in a chunk, such that a launch has at most `programs` programs or, if the batch has more, one chunk."""
    n_tiles = triton.cdiv(length, ROWS)
    chunks = max(1, programs // (batch * n_blocks))
    return min(n_tiles, max(MIN_CHUNK_TILES, triton.cdiv(n_tiles, chunks)))


def _by_tile(B: Tensor, C: Tensor) -> tuple[Tensor, Any]:
    """B and C (B, T, N) as the kernels read them: (B, T/ROWS, N, 2, words) int64, ROWS tokens side by side, and what
    type is in the words."""
    both = torch.stack((B, C))
    if both.dtype not in TYPES:
        both = both.float()
    missing = -both.size(2) % ROWS
    if missing:
        both = F.pad(both, (0, 0, 0, missing))
    by_tile = both.unflatten(2, (-1, ROWS)).permute(1, 2, 4, 0, 3)
    # Copied by name: what counts as contiguous may have any stride where there is one state, which view would refuse.
    words = torch.empty_like(by_tile, memory_format=torch.contiguous_format).copy_(by_tile).view(torch.int64)
    return words, TYPES[both.dtype]


def _by_state(x_EN: Tensor) -> Tensor:
    """(..., E, N) -> (..., N, E) float32, contiguous: how the kernels hold states and A."""
    return x_EN.float().transpose(-1, -2).contiguous()


def _shape(dt: Tensor, tokens: Tensor, block: int, packed: bool) -> dict[str, Any]:
    """Compile-time arguments that all but the carry take."""
    length, channels = dt.shape[1:]
    return {
        "E": channels,
        "N": tokens.size(2),
        "WORDS": tokens.size(4),
        "ROWS": ROWS,
        "BLOCK_E": block,
        "DT_ROW": dt.stride(1),
        "MASKED": length % ROWS != 0 or channels % block != 0,
        "PACKED": packed,
        **COMPILE_OPTIONS,
    }


def _carry(A_NE: Tensor, edge_BNE: Tensor, slots: Tensor, slot_stride: int, dt_sums: Tensor, direction: int) -> None:
    """Runs the carry over `slots`, forward from the first (direction 1) or backward from the last one (-1)."""
    batch, n_chunks, channels = dt_sums.shape
    first = n_chunks - 1 if direction < 0 else 0
    carry_chunks[triton.cdiv(channels, CARRY_BLOCK_E), A_NE.size(0), batch](
        A_NE,
        edge_BNE,
        slots,
        dt_sums,
        n_chunks,
        slots.stride(0),
        slot_stride,
        first * slot_stride,
        first * channels,
        DIRECTION=direction,
        E=channels,
        N=A_NE.size(0),
        BLOCK_E=CARRY_BLOCK_E,
        AHEAD=CARRY_AHEAD,
        **COMPILE_OPTIONS,
    )


def _forward(
    scan: ScanOperands, initial_state: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    u, dt, A, B, C, D, z, dt_bias = scan
    batch, length, channels = u.shape
    n_states = A.size(1)
    u, dt = map(readable, (u, dt))
    tokens, token_type = _by_tile(B, C)
    # Without a gate or documents their pointers are passed on but never read.
    gate = u if z is None else readable(z)
    positions = u if doc_position is None else doc_position.contiguous()
    A_NE, D, dt_bias = _by_state(A), D.float().contiguous(), dt_bias.float().contiguous()
    n_tiles = triton.cdiv(length, ROWS)
    n_blocks = triton.cdiv(channels, FORWARD_BLOCK_E)
    chunk_tiles = tiles_per_chunk(batch, length, n_blocks, FORWARD_PROGRAMS * multiprocessors(u.device))
    n_chunks = triton.cdiv(n_tiles, chunk_tiles)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    starts = torch.empty(batch, n_tiles, n_states, channels, dtype=torch.float32, device=u.device)
    final_BNE = torch.empty(batch, n_states, channels, dtype=torch.float32, device=u.device)
    dt_sums = torch.empty(batch, n_chunks, channels, dtype=torch.float32, device=u.device)
    shape = _shape(dt, tokens, FORWARD_BLOCK_E, doc_position is not None) | {
        "U_ROW": u.stride(1),
        "TOKEN_TYPE": token_type,
    }
    together = TOGETHER if n_states % TOGETHER == 0 else 1
    with torch.cuda.device_of(u):
        if n_chunks > 1:
            chunk_ends[n_blocks, n_chunks - 1, batch](
                u,
                dt,
                A_NE,
                tokens,
                dt_bias,
                positions,
                starts,
                dt_sums,
                length,
                chunk_tiles,
                u.stride(0),
                dt.stride(0),
                TOGETHER=together,
                **shape,
            )
        _carry(A_NE, _by_state(initial_state), starts, chunk_tiles * n_states * channels, dt_sums, direction=1)
        chunk_outputs[n_blocks, n_chunks, batch](
            u,
            dt,
            A_NE,
            tokens,
            D,
            gate,
            dt_bias,
            positions,
            out,
            starts,
            final_BNE,
            length,
            chunk_tiles,
            u.stride(0),
            dt.stride(0),
            gate.stride(0),
            Z_ROW=gate.stride(1),
            HAS_Z=z is not None,
            TOGETHER=together,
            **shape,
        )
    return out, final_BNE.transpose(1, 2).contiguous(), starts


def _backward(
    g_out: Tensor,
    g_final: Tensor,
    scan: ScanOperands,
    starts: Tensor,
    doc_position: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, ...]:
    u, dt, A, B, C, D, z, dt_bias = scan
    batch, length, channels = u.shape
    n_states, device = A.size(1), u.device
    u, dt, g_out = map(readable, (u, dt, g_out))
    tokens, token_type = _by_tile(B, C)
    gate = u if z is None else readable(z)
    positions = u if doc_position is None else doc_position.contiguous()
    A_NE, skip_E, bias_E = _by_state(A), D.float().contiguous(), dt_bias.float().contiguous()
    n_blocks = triton.cdiv(channels, BLOCK_E)
    chunk_tiles = tiles_per_chunk(batch, length, n_blocks, BACKWARD_PROGRAMS * multiprocessors(device))
    n_chunks = triton.cdiv(starts.size(1), chunk_tiles)
    adjoints = torch.empty(batch, n_chunks, n_states, channels, dtype=torch.float32, device=device)
    dt_sums = torch.empty(batch, n_chunks, channels, dtype=torch.float32, device=device)
    du = torch.empty(u.shape, dtype=u.dtype, device=device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=device)
    dz = u.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=device)
    dz = dz if into is None else into
    channel_sums = torch.empty(batch * n_chunks, n_states + 2, channels, dtype=torch.float32, device=device)
    token_sums = torch.empty(n_blocks, batch, length, 2, n_states, dtype=torch.float32, device=device)
    shape = _shape(dt, tokens, BLOCK_E, doc_position is not None) | {
        "TOKEN_TYPE": token_type,
        "Z_ROW": gate.stride(1),
        "DOUT_ROW": g_out.stride(1),
        "HAS_Z": z is not None,
    }
    states = triton.next_power_of_2(n_states)
    together = TOGETHER if n_states % TOGETHER == 0 else 1
    with torch.cuda.device_of(u):
        if n_chunks > 1:
            chunk_adjoints[n_blocks, n_chunks - 1, batch](
                dt,
                A_NE,
                tokens,
                gate,
                bias_E,
                positions,
                g_out,
                adjoints,
                dt_sums,
                length,
                chunk_tiles,
                dt.stride(0),
                gate.stride(0),
                g_out.stride(0),
                TOGETHER=together,
                **shape,
            )
        _carry(A_NE, _by_state(g_final), adjoints, n_states * channels, dt_sums, direction=-1)
        chunk_gradients[n_blocks, n_chunks, batch](
            u,
            dt,
            A_NE,
            tokens,
            skip_E,
            gate,
            bias_E,
            positions,
            g_out,
            starts,
            adjoints,
            du,
            ddt,
            dz,
            channel_sums,
            token_sums,
            length,
            chunk_tiles,
            u.stride(0),
            dt.stride(0),
            gate.stride(0),
            g_out.stride(0),
            dz.stride(0),
            U_ROW=u.stride(1),
            DZ_ROW=dz.stride(1) if dz.dim() == 3 else 0,
            STATES=max(FEW_STATES, states),
            ROUNDED=u.dtype != torch.float32,
            # The interpreter, which runs on the CPU, has no bfloat16 product.
            DOT_TYPE=tl.float32 if device.type == "cpu" else tl.bfloat16,
            # Of whole tiles only, whose addresses are all inside.
            PREFETCHED=states if can_prefetch(device) and not shape["MASKED"] else 0,
            num_stages=1,
            maxnreg=BACKWARD_REGISTERS,
            **(shape | {"num_warps": GRADIENT_WARPS}),
        )
        dA, dB, dC, dD, d_bias = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (A, B, C, D, dt_bias))
        sum_channels(channel_sums, dA, dD, d_bias)
        sum_pairs(token_sums, dB, dC)
    return (
        du,
        ddt,
        dA,
        dB,
        dC,
        dD,
        dz,
        d_bias,
        adjoints[:, 0].transpose(1, 2).contiguous(),
    )


selective_scan_triton_op = make_scan_op("selective_scan_triton", _forward, _backward, ROWS, into="z")
