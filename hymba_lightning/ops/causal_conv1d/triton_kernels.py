"""Triton kernels of the causal depthwise convolution with SiLU, forward and backward.

B batch, T sequence, E channels, W taps. A program owns BLOCK_E channels and walks over tiles of ROWS tokens, each
thread whole channels: a tile's tokens sit in its registers as a tuple of (BLOCK_E,) vectors, and every load and store
is coalesced over the contiguous channels. Positions -(W-1) ... -1 are the state before the sequence, `initial`
(B, E, W-1), oldest first. Where documents are PACKED, doc_position (B, T) int32 says how far back a token sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hymba_lightning.ops.triton_math import inside_if, sigmoid


@triton.jit
def load_input(x, initial, token, row: tl.constexpr, channel, T, E: tl.constexpr, W: tl.constexpr, X_ROW: tl.constexpr):
    """Input at position token + row >= 1-W as float32 (BLOCK_E,), zero after the last one. `x` points at `token`."""
    position = token + row
    value = tl.load(
        x + channel + row * X_ROW, mask=inside_if(channel, E, (position >= 0) & (position < T)), other=0.0
    ).to(tl.float32)
    if row < 0:
        old = tl.load(
            initial + channel * (W - 1) + (W - 1) + position, mask=inside_if(channel, E, position < 0), other=0.0
        )
        value += old.to(tl.float32)
    return value


@triton.jit
def convolve(window, taps, bias, reach, first: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr):
    """bias + Σ_w taps[w] window[first + w], in the order of the definition, over inputs at most `reach` back."""
    total = bias
    for w in tl.static_range(W):
        total += taps[w] * if_seen(window[first + w], reach, W - 1 - w, PACKED)
    return total


@triton.jit
def if_seen(value, reach, lag: tl.constexpr, PACKED: tl.constexpr):
    """The value (BLOCK_E,), or zeros where a token sees no further back than `reach` < lag."""
    if PACKED and lag > 0:
        return tl.where(reach >= lag, value, 0.0)
    else:
        return value


@triton.jit
def load_reach(doc_position, token, row: tl.constexpr, T, PACKED: tl.constexpr):
    """How many earlier tokens of its document the token at token + row >= 0 has. `doc_position` points at `token`."""
    if PACKED:
        return tl.load(doc_position + row, mask=token + row < T, other=0)
    else:
        return 0


@triton.jit(do_not_specialize=["T", "tiles_per_program"])
def conv_forward(
    x,
    weight,
    bias,
    initial,
    doc_position,
    out,
    T,
    tiles_per_program,
    x_batch,
    E: tl.constexpr,
    W: tl.constexpr,
    X_ROW: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out (B, T, E). Grid (E blocks, spans of tiles_per_program tiles, B)."""
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < E
    token = tl.program_id(1) * tiles_per_program * ROWS
    end = tl.minimum(token + tiles_per_program * ROWS, T)
    x += batch * x_batch + token.to(tl.int64) * X_ROW
    doc_position += batch * T + token
    out += (batch * T + token) * E
    initial += batch * (E * (W - 1))
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + channel * W + w, mask=inside, other=0.0).to(tl.float32),)
    constant = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    while token < end:
        window = ()
        for row in tl.static_range(1 - W, ROWS):
            window += (load_input(x, initial, token, row, channel, T, E, W, X_ROW),)
        for row in tl.static_range(ROWS):
            reach = load_reach(doc_position, token, row, T, PACKED)
            y = convolve(window, taps, constant, reach, row, W, PACKED)
            if SILU:
                y = y * sigmoid(y)
            tl.store(out + channel + row * E, y.to(out.dtype.element_ty), mask=inside_if(channel, E, token + row < T))
        x += ROWS * X_ROW
        doc_position += ROWS
        out += ROWS * E
        token += ROWS


@triton.jit(do_not_specialize=["T", "tiles_per_program"])
def conv_backward(
    x,
    weight,
    bias,
    initial,
    doc_position,
    dout,
    dx,
    dinitial,
    sums,
    T,
    tiles_per_program,
    x_batch,
    dout_batch,
    dx_batch,
    E: tl.constexpr,
    W: tl.constexpr,
    X_ROW: tl.constexpr,
    DOUT_ROW: tl.constexpr,
    DX_ROW: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dx (B, T, E), dinitial (B, E, W-1), and this program's part of the gradients of the W taps and the bias.

    Grid (E blocks, spans, B). sums (B, spans, W+1, E) float32 takes the parts. The convolution before SiLU is computed
    again, W-1 tokens beyond each tile too.
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < E
    token = tl.program_id(1) * tiles_per_program * ROWS
    end = tl.minimum(token + tiles_per_program * ROWS, T)
    x += batch * x_batch + token.to(tl.int64) * X_ROW
    dout += batch * dout_batch + token.to(tl.int64) * DOUT_ROW
    doc_position += batch * T + token
    dx += batch * dx_batch + token.to(tl.int64) * DX_ROW
    initial += batch * (E * (W - 1))
    dinitial += batch * (E * (W - 1))
    taps = ()
    d_taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + channel * W + w, mask=inside, other=0.0).to(tl.float32),)
        d_taps += (tl.zeros([BLOCK_E], tl.float32),)
    constant = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    d_constant = tl.zeros([BLOCK_E], tl.float32)
    while token < end:
        window = ()
        for row in tl.static_range(1 - W, ROWS + W - 1):
            window += (load_input(x, initial, token, row, channel, T, E, W, X_ROW),)
        d_sum = ()
        reach = ()
        for row in tl.static_range(ROWS + W - 1):
            reach += (load_reach(doc_position, token, row, T, PACKED),)
            d_row = tl.load(dout + channel + row * DOUT_ROW, mask=inside_if(channel, E, token + row < T), other=0.0).to(
                tl.float32
            )
            if SILU:
                y = convolve(window, taps, constant, reach[row], row, W, PACKED)
                gate = sigmoid(y)
                d_row = d_row * gate * (1.0 + y * (1.0 - gate))
            d_sum += (d_row,)
        for row in tl.static_range(ROWS):
            d_constant += d_sum[row]
            d_taps_next = ()
            for w in tl.static_range(W):
                d_taps_next += (d_taps[w] + d_sum[row] * if_seen(window[row + w], reach[row], W - 1 - w, PACKED),)
            d_taps = d_taps_next
        for row in tl.static_range(ROWS):
            d_input = tl.zeros([BLOCK_E], tl.float32)
            for w in tl.static_range(W):
                d_input += taps[W - 1 - w] * if_seen(d_sum[row + w], reach[row + w], w, PACKED)
            tl.store(
                dx + channel + row * DX_ROW,
                d_input.to(dx.dtype.element_ty),
                mask=inside_if(channel, E, token + row < T),
            )
        if token == 0:
            for row in tl.static_range(1 - W, 0):
                d_input = tl.zeros([BLOCK_E], tl.float32)
                for w in tl.static_range(-row, W):
                    d_input += taps[W - 1 - w] * if_seen(d_sum[row + w], reach[row + w], w, PACKED)
                tl.store(dinitial + channel * (W - 1) + row + W - 1, d_input.to(dinitial.dtype.element_ty), mask=inside)
        x += ROWS * X_ROW
        doc_position += ROWS
        dout += ROWS * DOUT_ROW
        dx += ROWS * DX_ROW
        token += ROWS
    sums += (batch * tl.num_programs(1) + tl.program_id(1)) * ((W + 1) * E) + channel
    for w in tl.static_range(W):
        tl.store(sums + w * E, d_taps[w], mask=inside)
    tl.store(sums + W * E, d_constant, mask=inside)
