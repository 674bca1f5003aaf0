"""Triton kernels of the selective scan, forward: chunk ends, carry across chunks, outputs.

B batch, T sequence, E channels, N states per channel. Time is cut into tiles of ROWS tokens and chunks of
`tiles_per_chunk` tiles. `starts` (B, T/ROWS, N, E) float32 holds the state before each tile, for backward.

One program owns BLOCK_E channels and a chunk, and each thread owns whole channels: a tile's tokens sit in its registers
as tuples of (BLOCK_E,) vectors, so the recurrence needs no exchange between threads, loads and stores are coalesced
over the contiguous channels, and nothing of size (T, E, N) exists. The loop over states is not unrolled: between tiles
the states wait in `starts`, which keeps N free and the code small enough for the instruction cache.

B and C come as `tokens` (B, T/ROWS, N, 2, WORDS) int64: what a state needs of a tile's tokens, of TOKEN_TYPE and zero
after the last, side by side, since each of so few loads serves several tokens.

Where a document starts (PACKED: doc_position (B, T) int32 is 0) the time that decays are of is endless, while what
enters the state knows the true step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hymba_lightning.ops.triton_math import (
    LOG2E,
    forget_if_first,
    inside_if,
    load_float32,
    load_words,
    sigmoid,
    softplus,
    store_rounded,
    unpacked,
)


@triton.jit(do_not_specialize=["T", "tiles_per_chunk"])
def chunk_ends(
    u,
    dt,
    A,
    tokens,
    dt_bias,
    doc_position,
    starts,
    dt_sums,
    T,
    tiles_per_chunk,
    u_batch,
    dt_batch,
    E: tl.constexpr,
    N: tl.constexpr,
    U_ROW: tl.constexpr,
    DT_ROW: tl.constexpr,
    WORDS: tl.constexpr,
    TOKEN_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The state each chunk but the last ends in when it starts from zero, and its sum of time steps.

    Grid (E blocks, chunks - 1, B). The end goes into `starts`, at the tile after the chunk, and the sum, which makes
    the chunk's decay exp(A · sum), into dt_sums (B, chunks, E).
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n_tiles = tl.cdiv(T, ROWS)
    inside = channel < E
    first = chunk.to(tl.int64) * tiles_per_chunk * ROWS
    u += batch * u_batch + first * U_ROW
    dt += batch * dt_batch + first * DT_ROW
    tokens += (batch * n_tiles + chunk * tiles_per_chunk) * (N * 2 * WORDS)
    doc_position += batch * T + first
    starts += (batch * n_tiles + (chunk + 1) * tiles_per_chunk) * (N * E)
    bias = load_float32(dt_bias + channel, inside, MASKED)
    for n in range(N):
        store_rounded(starts + n * E + channel, tl.zeros([BLOCK_E], tl.float32), inside, MASKED)
    total = tl.zeros([BLOCK_E], tl.float32)
    tile = 0
    while tile < tiles_per_chunk:
        steps = ()
        driven = ()
        for row in tl.static_range(ROWS):
            step = softplus(load_float32(dt + channel + row * DT_ROW, inside, MASKED) + bias)
            driven += (step * load_float32(u + channel + row * U_ROW, inside, MASKED),)
            if PACKED:
                step += forget_if_first(doc_position + row, True, False)
            steps += (step,)
            total += step
        for first_n in range(0, N, TOGETHER):
            decay_rates = ()
            states = ()
            B_n = ()
            for k in tl.static_range(TOGETHER):
                n = first_n + k
                decay_rates += (load_float32(A + n * E + channel, inside, MASKED) * LOG2E,)
                states += (load_float32(starts + n * E + channel, inside, MASKED),)
                B_n += (unpacked(load_words(tokens + n * (2 * WORDS), WORDS), TOKEN_TYPE),)
            for row in tl.static_range(ROWS):
                next_states = ()
                for k in tl.static_range(TOGETHER):
                    decay = tl.exp2(steps[row] * decay_rates[k])
                    next_states += (decay * states[k] + driven[row] * B_n[k][row],)
                states = next_states
            for k in tl.static_range(TOGETHER):
                store_rounded(starts + (first_n + k) * E + channel, states[k], inside, MASKED)
        u += ROWS * U_ROW
        dt += ROWS * DT_ROW
        tokens += N * 2 * WORDS
        doc_position += ROWS
        tile += 1
        tl.debug_barrier()
    n_chunks = tl.num_programs(1) + 1
    store_rounded(dt_sums + (batch * n_chunks + chunk) * E + channel, total, inside, MASKED)


@triton.jit(do_not_specialize=["n_chunks", "first_slot", "first_sum"])
def carry_chunks(
    A,
    edge,
    slots,
    dt_sums,
    n_chunks,
    slot_batch,
    slot_stride,
    first_slot,
    first_sum,
    DIRECTION: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Turns what each chunk adds into what crosses its edge: value ← exp(A · sum) · value + slot, chunk by chunk.

    Grid (E blocks, N, B). `edge` (B, N, E) is the value before the first step. Slots are `slot_stride` elements apart
    and the edge goes into the one at `first_slot`; DIRECTION is 1 for states, forward in time, and -1 for adjoints.
    AHEAD chunks are loaded before their chain of multiplications starts, since each alone would wait for memory.
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < E
    decay_rate = tl.load(A + n * E + channel, mask=inside, other=0.0) * LOG2E
    value = tl.load(edge + batch * (N * E) + n * E + channel, mask=inside, other=0.0)
    slot = slots + batch * slot_batch + first_slot + n * E + channel
    sums = dt_sums + batch * n_chunks * E + first_sum + channel
    tl.store(slot, value, mask=inside)
    done = 1
    while done < n_chunks:
        added = ()
        decays = ()
        for ahead in tl.static_range(AHEAD):
            wanted = inside_if(channel, E, done + ahead < n_chunks)
            added += (tl.load(slot + (ahead + 1) * DIRECTION * slot_stride, mask=wanted, other=0.0),)
            decays += (tl.exp2(decay_rate * tl.load(sums + ahead * DIRECTION * E, mask=wanted, other=0.0)),)
        for ahead in tl.static_range(AHEAD):
            value = decays[ahead] * value + added[ahead]
            wanted = inside_if(channel, E, done + ahead < n_chunks)
            tl.store(slot + (ahead + 1) * DIRECTION * slot_stride, value, mask=wanted)
        slot += AHEAD * DIRECTION * slot_stride
        sums += AHEAD * DIRECTION * E
        done += AHEAD


@triton.jit(do_not_specialize=["T", "tiles_per_chunk"])
def chunk_outputs(
    u,
    dt,
    A,
    tokens,
    D,
    z,
    dt_bias,
    doc_position,
    out,
    starts,
    final,
    T,
    tiles_per_chunk,
    u_batch,
    dt_batch,
    z_batch,
    E: tl.constexpr,
    N: tl.constexpr,
    U_ROW: tl.constexpr,
    DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    HAS_Z: tl.constexpr,
    WORDS: tl.constexpr,
    TOKEN_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Outputs (B, T, E), the state before every tile, and after the last token (B, N, E).

    Grid (E blocks, chunks, B). The state before each chunk's first tile is in `starts` already.
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    batch = tl.program_id(2).to(tl.int64)
    n_tiles = tl.cdiv(T, ROWS)
    tile = tl.program_id(1) * tiles_per_chunk
    last = tl.minimum(tile + tiles_per_chunk, n_tiles) - 1
    inside = channel < E
    first = tile.to(tl.int64) * ROWS
    u += batch * u_batch + first * U_ROW
    dt += batch * dt_batch + first * DT_ROW
    tokens += (batch * n_tiles + tile) * (N * 2 * WORDS)
    doc_position += batch * T + first
    out += batch * T * E + first * E
    if HAS_Z:
        z += batch * z_batch + first * Z_ROW
    starts += (batch * n_tiles + tile) * (N * E)
    final += batch * (N * E)
    bias = load_float32(dt_bias + channel, inside, MASKED)
    skip = load_float32(D + channel, inside, MASKED)
    while tile <= last:
        steps = ()
        driven = ()
        y = ()
        for row in tl.static_range(ROWS):
            known = inside_if(channel, E, tile * ROWS + row < T)
            step = softplus(load_float32(dt + channel + row * DT_ROW, known, MASKED) + bias)
            if MASKED:
                step = tl.where(known, step, 0.0)
            u_row = load_float32(u + channel + row * U_ROW, known, MASKED)
            driven += (step * u_row,)
            y += (skip * u_row,)
            if PACKED:
                step += forget_if_first(doc_position + row, tile * ROWS + row < T, MASKED)
            steps += (step,)
        for first_n in range(0, N, TOGETHER):
            decay_rates = ()
            states = ()
            values = ()
            for k in tl.static_range(TOGETHER):
                n = first_n + k
                decay_rates += (load_float32(A + n * E + channel, inside, MASKED) * LOG2E,)
                states += (load_float32(starts + n * E + channel, inside, MASKED),)
                values += (unpacked(load_words(tokens + n * (2 * WORDS), 2 * WORDS), TOKEN_TYPE),)
            y_next = ()
            for row in tl.static_range(ROWS):
                y_row = y[row]
                next_states = ()
                for k in tl.static_range(TOGETHER):
                    decay = tl.exp2(steps[row] * decay_rates[k])
                    state = decay * states[k] + driven[row] * values[k][row]
                    next_states += (state,)
                    y_row += values[k][ROWS + row] * state
                states = next_states
                y_next += (y_row,)
            y = y_next
            # The next chunk's first tile has its state from the carry: this one, equal but for rounding, must not race.
            for k in tl.static_range(TOGETHER):
                n = first_n + k
                tl.store(starts + (N + n) * E + channel, states[k], mask=inside_if(channel, E, tile < last))
                tl.store(final + n * E + channel, states[k], mask=inside_if(channel, E, tile == n_tiles - 1))
        for row in tl.static_range(ROWS):
            known = inside_if(channel, E, tile * ROWS + row < T)
            y_row = y[row]
            if HAS_Z:
                z_row = load_float32(z + channel + row * Z_ROW, known, MASKED)
                y_row = y_row * z_row * sigmoid(z_row)
            store_rounded(out + channel + row * E, y_row, known, MASKED)
        u += ROWS * U_ROW
        dt += ROWS * DT_ROW
        tokens += N * 2 * WORDS
        doc_position += ROWS
        out += ROWS * E
        if HAS_Z:
            z += ROWS * Z_ROW
        starts += N * E
        tile += 1
        tl.debug_barrier()
