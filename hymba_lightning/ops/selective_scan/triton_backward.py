"""Triton kernels of the selective scan, backward: adjoints at the chunks' edges, then every gradient.

Layout of the work as in triton_forward. The adjoint of a state is the gradient of the loss with respect to it, from all
that comes after; it runs from the last token to the first: q_{t-1} = exp(dt_t A) g_t with g_t = q_t + C_t dy_t, where
dy = dout silu(z) and q_T is the final state's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hymba_lightning.ops.triton_math import (
    LN2,
    LOG2E,
    forget_if_first,
    inside_if,
    load_float32,
    load_words,
    prefetch_rows,
    sigmoid,
    softplus,
    store_rounded,
    unpacked,
)


@triton.jit(do_not_specialize=["T", "tiles_per_chunk"])
def chunk_adjoints(
    dt,
    A,
    tokens,
    z,
    dt_bias,
    doc_position,
    dout,
    adjoints,
    dt_sums,
    T,
    tiles_per_chunk,
    dt_batch,
    z_batch,
    dout_batch,
    E: tl.constexpr,
    N: tl.constexpr,
    DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    DOUT_ROW: tl.constexpr,
    HAS_Z: tl.constexpr,
    WORDS: tl.constexpr,
    TOKEN_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What each chunk but the first sends to the state before it if nothing comes after it, and its sum of time steps.

    Grid (E blocks, chunks - 1, B): program c serves chunk c+1 and writes slot c of `adjoints` (B, chunks, N, E), where
    the carry then puts what enters chunk c from behind. The sum goes into slot c+1 of dt_sums (B, chunks, E).
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(1) + 1
    n_chunks = tl.num_programs(1) + 1
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < E
    n_tiles = tl.cdiv(T, ROWS)
    tile = tl.minimum((chunk + 1) * tiles_per_chunk, n_tiles) - 1
    last = tile.to(tl.int64) * ROWS
    dt += batch * dt_batch + last * DT_ROW
    tokens += (batch * n_tiles + tile) * (N * 2 * WORDS)
    doc_position += batch * T + last
    dout += batch * dout_batch + last * DOUT_ROW
    if HAS_Z:
        z += batch * z_batch + last * Z_ROW
    adjoints += (batch * n_chunks + chunk - 1) * (N * E)
    bias = load_float32(dt_bias + channel, inside, MASKED)
    for n in range(N):
        store_rounded(adjoints + n * E + channel, tl.zeros([BLOCK_E], tl.float32), inside, MASKED)
    total = tl.zeros([BLOCK_E], tl.float32)
    while tile >= chunk * tiles_per_chunk:
        steps = ()
        dy = ()
        for row in tl.static_range(ROWS):
            known = inside_if(channel, E, tile * ROWS + row < T)
            step = softplus(load_float32(dt + channel + row * DT_ROW, known, MASKED) + bias)
            if MASKED:
                step = tl.where(known, step, 0.0)
            dy_row = load_float32(dout + channel + row * DOUT_ROW, known, MASKED)
            if HAS_Z:
                z_row = load_float32(z + channel + row * Z_ROW, known, MASKED)
                dy_row = dy_row * z_row * sigmoid(z_row)
            if PACKED:
                step += forget_if_first(doc_position + row, tile * ROWS + row < T, MASKED)
            steps += (step,)
            dy += (dy_row,)
            total += step
        for first_n in range(0, N, TOGETHER):
            decay_rates = ()
            qs = ()
            C_n = ()
            for k in tl.static_range(TOGETHER):
                n = first_n + k
                decay_rates += (load_float32(A + n * E + channel, inside, MASKED) * LOG2E,)
                qs += (load_float32(adjoints + n * E + channel, inside, MASKED),)
                C_n += (unpacked(load_words(tokens + n * (2 * WORDS) + WORDS, WORDS), TOKEN_TYPE),)
            for row in tl.static_range(ROWS - 1, -1, -1):
                next_qs = ()
                for k in tl.static_range(TOGETHER):
                    decay = tl.exp2(steps[row] * decay_rates[k])
                    next_qs += (decay * (C_n[k][row] * dy[row] + qs[k]),)
                qs = next_qs
            for k in tl.static_range(TOGETHER):
                store_rounded(adjoints + (first_n + k) * E + channel, qs[k], inside, MASKED)
        dt -= ROWS * DT_ROW
        tokens -= N * 2 * WORDS
        doc_position -= ROWS
        dout -= ROWS * DOUT_ROW
        if HAS_Z:
            z -= ROWS * Z_ROW
        tile -= 1
        tl.debug_barrier()
    store_rounded(dt_sums + (batch * n_chunks + chunk) * E + channel, total, inside, MASKED)


@triton.jit
def prepend(value, values):
    """The tuple (value, *values), which Triton does not know by that name."""
    return (value,) + values  # noqa: RUF005


@triton.jit
def interleave(columns):
    """A tuple of 2^k vectors (BLOCK_E,) as one tensor (BLOCK_E, 2, ..., 2): the index's first bit is the first axis."""
    half: tl.constexpr = len(columns) // 2
    if half == 0:
        return columns[0]
    else:
        pairs = ()
        for i in tl.static_range(half):
            pairs += (tl.join(columns[i], columns[i + half]),)
        return interleave(pairs)


@triton.jit(do_not_specialize=["T", "tiles_per_chunk"])
def chunk_gradients(
    u,
    dt,
    A,
    tokens,
    D,
    z,
    dt_bias,
    doc_position,
    dout,
    starts,
    adjoints,
    du,
    ddt,
    dz,
    channel_sums,
    token_sums,
    T,
    tiles_per_chunk,
    u_batch,
    dt_batch,
    z_batch,
    dout_batch,
    dz_batch,
    E: tl.constexpr,
    N: tl.constexpr,
    U_ROW: tl.constexpr,
    DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    DOUT_ROW: tl.constexpr,
    DZ_ROW: tl.constexpr,
    HAS_Z: tl.constexpr,
    WORDS: tl.constexpr,
    TOKEN_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STATES: tl.constexpr,
    ROUNDED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PREFETCHED: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of u, dt and z (B, T, E), and partial sums of the others.

    Grid (E blocks, chunks, B). Slot c of `adjoints` (B, chunks, N, E) holds what enters chunk c from behind, and at the
    end what it sends ahead. channel_sums (B, chunks, N+2, E) takes this chunk's part of the gradients of A (N rows), D
    and dt_bias; token_sums (E blocks, B, T, 2, N) this block's part of those of B and C. That sum over channels,
    exchanged between threads, would be half the kernel's work: when ROUNDED, for 16-bit operands, it is a product with
    a matrix of ones, which the matrix units take in DOT_TYPE (bfloat16) and add in float32. STATES is N rounded up to a
    size they accept. PREFETCHED is N rounded up to a power of two where the next tile can be asked for ahead, else 0:
    too few programs fit a multiprocessor to hide the memory's latency behind one another.
    """
    channel = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(1)
    n_chunks = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    n_tiles = tl.cdiv(T, ROWS)
    inside = channel < E
    tile = tl.minimum((chunk + 1) * tiles_per_chunk, n_tiles) - 1
    last = tile.to(tl.int64) * ROWS
    u += batch * u_batch + last * U_ROW
    dt += batch * dt_batch + last * DT_ROW
    tokens += (batch * n_tiles + tile) * (N * 2 * WORDS)
    doc_position += batch * T + last
    dout += batch * dout_batch + last * DOUT_ROW
    du += batch * T * E + last * E
    ddt += batch * T * E + last * E
    if HAS_Z:
        z += batch * z_batch + last * Z_ROW
        dz += batch * dz_batch + last * DZ_ROW
    starts += (batch * n_tiles + tile) * (N * E)
    adjoints += (batch * n_chunks + chunk) * (N * E)
    channel_sums += (batch * n_chunks + chunk) * ((N + 2) * E)
    # Column c of a tile's sums: the first ROWS are tokens' parts of dB, the others of dC.
    column = tl.arange(0, 2 * ROWS)
    state_row = tl.arange(0, STATES)
    token_sums += (tl.program_id(0) * tl.num_programs(2) + batch) * T * (2 * N) + last * (2 * N)
    for n in range(N + 2):
        store_rounded(channel_sums + n * E + channel, tl.zeros([BLOCK_E], tl.float32), inside, MASKED)
    while tile >= chunk * tiles_per_chunk:
        # What a state needs from memory is asked for one state ahead.
        next_rate = load_float32(A + channel, inside, MASKED)
        next_state = load_float32(starts + channel, inside, MASKED)
        next_q = load_float32(adjoints + channel, inside, MASKED)
        next_d_rate = load_float32(channel_sums + channel, inside, MASKED)
        next_words = load_words(tokens, 2 * WORDS)
        bias = load_float32(dt_bias + channel, inside, MASKED)
        skip = load_float32(D + channel, inside, MASKED)
        steps = ()
        driven = ()
        dy = ()
        y = ()
        d_driven = ()
        d_steps = ()
        for row in tl.static_range(ROWS):
            known = inside_if(channel, E, tile * ROWS + row < T)
            step = softplus(load_float32(dt + channel + row * DT_ROW, known, MASKED) + bias)
            if MASKED:
                step = tl.where(known, step, 0.0)
            u_row = load_float32(u + channel + row * U_ROW, known, MASKED)
            dy_row = load_float32(dout + channel + row * DOUT_ROW, known, MASKED)
            if HAS_Z:
                z_row = load_float32(z + channel + row * Z_ROW, known, MASKED)
                dy_row = dy_row * z_row * sigmoid(z_row)
            driven += (step * u_row,)
            if PACKED:
                step += forget_if_first(doc_position + row, tile * ROWS + row < T, MASKED)
            steps += (step,)
            dy += (dy_row,)
            y += (skip * u_row,)
            d_driven += (tl.zeros([BLOCK_E], tl.float32),)
            d_steps += (tl.zeros([BLOCK_E], tl.float32),)
        if PREFETCHED > 0:  # noqa: SIM102 (decided when compiled; the other while running)
            if tile > chunk * tiles_per_chunk:
                left = tl.program_id(0) * BLOCK_E
                prefetch_rows(u - ROWS * U_ROW + left, U_ROW, ROWS - 1, ROWS, BLOCK_E)
                prefetch_rows(dt - ROWS * DT_ROW + left, DT_ROW, ROWS - 1, ROWS, BLOCK_E)
                prefetch_rows(dout - ROWS * DOUT_ROW + left, DOUT_ROW, ROWS - 1, ROWS, BLOCK_E)
                if HAS_Z:
                    prefetch_rows(z - ROWS * Z_ROW + left, Z_ROW, ROWS - 1, ROWS, BLOCK_E)
                prefetch_rows(tokens - N * 2 * WORDS, 0, 0, 1, PREFETCHED * 2 * WORDS)
                prefetch_rows(starts - N * E + left, E, N - 1, PREFETCHED, BLOCK_E)
        sums = tl.zeros([STATES, 2 * ROWS], tl.float32)
        if ROUNDED:
            ones = tl.full([STATES, BLOCK_E], 1.0, tl.float32).to(DOT_TYPE)
            rounded = tl.zeros([BLOCK_E, 2 * ROWS], tl.bfloat16)
        for n in range(N):
            decay_rate = next_rate * LOG2E
            state = next_state
            q = next_q
            d_rate = next_d_rate
            values = unpacked(next_words, TOKEN_TYPE)
            ahead = tl.minimum(n + 1, N - 1)
            next_rate = load_float32(A + ahead * E + channel, inside, MASKED)
            next_state = load_float32(starts + ahead * E + channel, inside, MASKED)
            next_q = load_float32(adjoints + ahead * E + channel, inside, MASKED)
            next_d_rate = load_float32(channel_sums + ahead * E + channel, inside, MASKED)
            next_words = load_words(tokens + ahead * (2 * WORDS), 2 * WORDS)
            if ROUNDED:
                # The product of the state before this one: nothing waits for it here.
                sums = tl.where((state_row == n - 1)[:, None], tl.dot(ones, rounded.to(DOT_TYPE)), sums)
            B_n = values[:ROWS]
            C_n = values[ROWS:]
            decays = ()
            before = ()
            y_next = ()
            dC = ()
            for row in tl.static_range(ROWS):
                decay = tl.exp2(steps[row] * decay_rate)
                decays += (decay,)
                before += (state,)
                state = decay * state + driven[row] * B_n[row]
                y_next += (y[row] + C_n[row] * state,)
                dC += (state * dy[row],)
            y = y_next
            dB = ()
            d_driven_next = ()
            d_steps_next = ()
            for row in tl.static_range(ROWS - 1, -1, -1):
                g = C_n[row] * dy[row] + q
                q = decays[row] * g
                d_exponent = q * before[row]
                d_rate += d_exponent * steps[row]
                dB = prepend(g * driven[row], dB)
                d_driven_next = prepend(d_driven[row] + g * B_n[row], d_driven_next)
                d_steps_next = prepend(d_steps[row] + d_exponent * decay_rate, d_steps_next)
            d_driven = d_driven_next
            d_steps = d_steps_next
            store_rounded(adjoints + n * E + channel, q, inside, MASKED)
            store_rounded(channel_sums + n * E + channel, d_rate, inside, MASKED)
            products = tl.reshape(interleave(dB + dC), [BLOCK_E, 2 * ROWS])
            if ROUNDED:
                rounded = products.to(tl.bfloat16)
            else:
                sums = tl.where((state_row == n)[:, None], tl.sum(products, axis=0)[None, :], sums)
        if ROUNDED:
            sums = tl.where((state_row == N - 1)[:, None], tl.dot(ones, rounded.to(DOT_TYPE)), sums)
        wanted = (state_row < N)[:, None] & (tile * ROWS + column % ROWS < T)[None, :]
        place = state_row[:, None] + ((column % ROWS) * (2 * N) + (column // ROWS) * N)[None, :]
        tl.store(token_sums + place, sums, mask=wanted)
        # Read again, like the rows below: kept over the loop above they would not fit the registers.
        bias = load_float32(dt_bias + channel, inside, MASKED)
        skip = load_float32(D + channel, inside, MASKED)
        d_skip = load_float32(channel_sums + N * E + channel, inside, MASKED)
        d_bias = load_float32(channel_sums + (N + 1) * E + channel, inside, MASKED)
        for row in tl.static_range(ROWS):
            known = inside_if(channel, E, tile * ROWS + row < T)
            raw = load_float32(dt + channel + row * DT_ROW, known, MASKED) + bias
            u_row = load_float32(u + channel + row * U_ROW, known, MASKED)
            d_raw = (d_driven[row] * u_row + d_steps[row] * LN2) * sigmoid(raw)
            if MASKED:
                d_raw = tl.where(known, d_raw, 0.0)
            d_bias += d_raw
            d_skip += dy[row] * u_row
            store_rounded(ddt + channel + row * E, d_raw, known, MASKED)
            step = steps[row]
            if PACKED:  # noqa: SIM102 (decided when compiled; the other while running)
                if forget_if_first(doc_position + row, tile * ROWS + row < T, MASKED) > 0:
                    step = softplus(raw)
            store_rounded(du + channel + row * E, d_driven[row] * step + skip * dy[row], known, MASKED)
            if HAS_Z:
                z_row = load_float32(z + channel + row * Z_ROW, known, MASKED)
                gate = sigmoid(z_row)
                dz_row = load_float32(dout + channel + row * DOUT_ROW, known, MASKED) * y[row]
                store_rounded(dz + channel + row * DZ_ROW, dz_row * gate * (1.0 + z_row * (1.0 - gate)), known, MASKED)
        store_rounded(channel_sums + N * E + channel, d_skip, inside, MASKED)
        store_rounded(channel_sums + (N + 1) * E + channel, d_bias, inside, MASKED)
        u -= ROWS * U_ROW
        dt -= ROWS * DT_ROW
        tokens -= N * 2 * WORDS
        doc_position -= ROWS
        dout -= ROWS * DOUT_ROW
        du -= ROWS * E
        ddt -= ROWS * E
        if HAS_Z:
            z -= ROWS * Z_ROW
            dz -= ROWS * DZ_ROW
        starts -= N * E
        token_sums -= ROWS * (2 * N)
        tile -= 1
        tl.debug_barrier()
