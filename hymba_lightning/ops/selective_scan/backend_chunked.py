"""The selective scan in plain PyTorch, chunk by chunk inside one operator, on any device.

The sequence is cut into segments that advance side by side (one on a CPU; about sqrt(T) on a GPU, which so waits for
about sqrt(T) launches instead of T), a segment into blocks of one or a few chunks. Inside a block everything but the
recurrence itself is done for all its tokens at once. Every exponential is of dt·A <= 0 or of a sum of those, so no dt·A
overflows.

B batch, T sequence, E channels, N states, P segments, L tokens of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.selective_scan.operator import ScanOperands, make_scan_op, n_chunks
from hymba_lightning.ops.threads import one_torch_thread

# Tokens between two saved states.
CHUNK = 64
# A step after which no state of before is left, whatever its rate: exp(dt·A) is exactly 0. Finite, since 0 · ∞ is NaN.
FORGET = 1e30
# A CPU's block has at most MAX_BLOCK chunks and, with more than one, BLOCK_ELEMENTS of B·L·N·E: small operands need
# long blocks to be worth an operator's call, large ones fill the cache.
MAX_BLOCK, BLOCK_ELEMENTS = 4, 2**19


def chunks_per_segment(length: int, device_type: str) -> int:
    """All of them on a CPU, which gains nothing from steps that are wider than its cache; sqrt(T) tokens elsewhere."""
    return n_chunks(length, CHUNK) if device_type == "cpu" else max(1, round(math.sqrt(length) / CHUNK))


class _Layout:
    """How T tokens fall into segments of whole chunks: `count` segments of `tokens` tokens, the last padded."""

    def __init__(self, u: Tensor, states: int) -> None:
        batch, self.length, channels = u.shape
        self.chunks = chunks_per_segment(self.length, u.device.type)
        self.count = n_chunks(self.length, self.chunks * CHUNK)
        self.tokens = self.length if self.count == 1 else self.chunks * CHUNK
        fitting = BLOCK_ELEMENTS // max(1, CHUNK * batch * states * channels) if u.device.type == "cpu" else 1
        self.block = max(1, min(fitting, MAX_BLOCK))

    def cut(self, x_BTX: Tensor, fill: float = 0.0) -> Tensor:
        """(B, T, X) -> (B, P, tokens, X), padded with `fill`."""
        missing = self.count * self.tokens - self.length
        if missing:
            x_BTX = F.pad(x_BTX, (0, 0, 0, missing), value=fill)
        return x_BTX.unflatten(1, (self.count, self.tokens))

    def empty(self, x_BTX: Tensor) -> Tensor:
        """An unwritten (B, P, tokens, X) in x's dtype."""
        shape = x_BTX.size(0), self.count, self.tokens, x_BTX.size(2)
        return torch.empty(shape, dtype=x_BTX.dtype, device=x_BTX.device)

    def uncut(self, x: Tensor) -> Tensor:
        """(B, P, tokens, X) -> (B, T, X)."""
        return x.flatten(1, 2)[:, : self.length].contiguous()

    def blocks(self) -> list[range]:
        """The chunks of each block."""
        return [range(c, min(c + self.block, self.chunks)) for c in range(0, self.chunks, self.block)]

    def span(self, chunks: range) -> slice:
        """The tokens of a block within every segment."""
        return slice(chunks.start * CHUNK, min(chunks.stop * CHUNK, self.tokens))


class _Operands:
    """The scan's inputs, cut into segments; padded tokens have dt = softplus(-inf) = 0 and so change no state."""

    def __init__(self, layout: _Layout, scan: ScanOperands, doc_position: Tensor | None) -> None:
        u, dt, A, B, C, D, z, dt_bias = scan
        self.u, self.dt = layout.cut(u), layout.cut(dt, float("-inf"))
        self.forget = None if doc_position is None else layout.cut((doc_position == 0)[..., None], False)
        self.B, self.C = layout.cut(B), layout.cut(C)
        self.z = None if z is None else layout.cut(z)
        self.A_NE, self.D, self.dt_bias = A.float().t().contiguous(), D.float(), dt_bias.float()
        # A CPU's exp2 takes a third of the time of its exp, and less where the result vanishes.
        self.A_log2e_NE = self.A_NE * math.log2(math.e)

    def passed(self, span: slice, step: Tensor) -> Tensor:
        """The time that a span's decays are of: its steps (B, P, L, E), endless where a document starts."""
        return step if self.forget is None else step.masked_fill(self.forget[:, :, span], FORGET)


@functools.cache
def _foreach_keeps_order() -> bool:
    """Whether foreach on a CPU treats one tensor after another, so that each may read what the one before became."""
    one, x, y = torch.ones(3, 1, device="cpu").unbind()
    torch._foreach_addcmul_([x, y], [one, one], [one, x])
    return (x.item(), y.item()) == (2.0, 3.0)


def _recur(xs: Sequence[Tensor], decays: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """x += decay * before, in place, one after another: `before` an x may be the x in front of it."""
    if xs and xs[0].device.type == "cpu" and _foreach_keeps_order():
        # The loop below in C++, at half the cost of a step.
        torch._foreach_addcmul_(list(xs), list(decays), list(before))
        return
    for x, decay, previous in zip(xs, decays, before, strict=True):
        x.addcmul_(decay, previous)


class _Work:
    """Memory for one block of all segments, (B, P, L, N, E) float32, used again for every block."""

    def __init__(self, layout: _Layout, ops: _Operands, buffers: int) -> None:
        tokens = min(layout.block * CHUNK, layout.tokens)
        shape = buffers, ops.u.size(0), layout.count, tokens, *ops.A_NE.shape
        memory = torch.empty(shape, dtype=torch.float32, device=ops.u.device)
        self.decay, self.x, *rest = memory.unbind(0)
        self.g = rest[0] if rest else self.x
        # Views of single tokens are made once: making one costs as much as the arithmetic on it.
        self.decays, self.xs = self.decay.unbind(2), self.x.unbind(2)
        self.gs = self.g.unbind(2) if rest else self.xs
        if tokens % CHUNK == 0:
            # The tokens at the same place of each chunk, (B, P, chunks, N, E).
            self.chunk_decays, self.chunk_xs = (x.unflatten(2, (-1, CHUNK)).unbind(3) for x in (self.decay, self.x))

    def advance(self, state: Tensor, tokens: int) -> Tensor:
        """Turns the inflows in x into states in place, beginning from `state`; returns the last one."""
        xs = self.xs[:tokens]
        _recur(xs, self.decays[:tokens], (state, *xs[:-1]))
        return xs[-1]

    def advance_chunks(self, starts: Tensor, tokens: int) -> None:
        """`advance` from the known state before each chunk: where all are whole, they advance side by side."""
        if tokens == len(self.xs) and tokens % CHUNK == 0:
            _recur(self.chunk_xs, self.chunk_decays, (starts, *self.chunk_xs[:-1]))
        else:
            self.advance(starts[:, :, 0], tokens)

    def retreat(self, carry: Tensor, tokens: int) -> Tensor:
        """Turns the outputs' gradients in g into the states', in place, from the last token to the first.

        `carry` is what the tokens after the block send to its last state; returns what it sends to the state before it.
        """
        gs, decays = self.gs[:tokens][::-1], self.decays[:tokens][::-1]
        gs[0].add_(carry)
        _recur(gs[1:], decays[:-1], gs[:-1])
        return decays[-1] * gs[-1]


class _Block:
    """One block of all segments, float32: operands (B, P, L, E or N), decays and inflows (B, P, L, N, E)."""

    def __init__(self, ops: _Operands, work: _Work, span: slice, inflows: bool = True) -> None:
        self.tokens = span.stop - span.start
        self.u, self.B, self.C = ops.u[:, :, span].float(), ops.B[:, :, span].float(), ops.C[:, :, span].float()
        self.z = None if ops.z is None else ops.z[:, :, span].float()
        self.raw = ops.dt[:, :, span].float() + ops.dt_bias
        self.step = F.softplus(self.raw)
        self.inflow = self.step * self.u
        passed = ops.passed(span, self.step)
        self.decay, self.x = work.decay[:, :, : self.tokens], work.x[:, :, : self.tokens]
        self.g = work.g[:, :, : self.tokens]
        torch.mul(passed.unsqueeze(-2), ops.A_log2e_NE, out=self.decay).exp2_()
        if inflows:
            torch.mul(self.inflow.unsqueeze(-2), self.B.unsqueeze(-1), out=self.x)


def _silu_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    """silu(z) and its derivative."""
    s = torch.sigmoid(z)
    silu = z * s
    return silu, torch.lerp(silu, silu.new_ones(()), s)


def _segment_decay(layout: _Layout, ops: _Operands) -> Tensor:
    """exp(A Σ dt) of each segment, (B, P, N, E): what a state before it is worth after it."""
    spans = (layout.span(chunks) for chunks in layout.blocks())
    steps = (ops.passed(span, F.softplus(ops.dt[:, :, span].float() + ops.dt_bias)) for span in spans)
    total = torch.stack([step.sum(2) for step in steps]).sum(0)
    return torch.exp2(total.unsqueeze(-2) * ops.A_log2e_NE)


def _segment_starts(layout: _Layout, ops: _Operands, work: _Work, initial: Tensor) -> Tensor:
    """The state before each segment (B, P, N, E), given the one before the first (B, N, E)."""
    if layout.count == 1:
        return initial.unsqueeze(1)
    end = torch.zeros_like(work.decays[0])
    for chunks in layout.blocks():
        block = _Block(ops, work, layout.span(chunks))
        end = work.advance(end, block.tokens).clone()
    starts, decay = [initial], _segment_decay(layout, ops)
    for p in range(layout.count - 1):
        starts.append(torch.addcmul(end[:, p], decay[:, p], starts[-1]))
    return torch.stack(starts, dim=1)


def _segment_carries(layout: _Layout, ops: _Operands, work: _Work, g_out: Tensor, g_final: Tensor) -> Tensor:
    """The gradient of the state after each segment (B, P, N, E), given that of the final state (B, N, E)."""
    if layout.count == 1:
        return g_final.unsqueeze(1)
    sent = torch.zeros_like(work.decays[0])
    for chunks in reversed(layout.blocks()):
        span = layout.span(chunks)
        block = _Block(ops, work, span, inflows=False)
        g_y = g_out[:, :, span].float()
        if block.z is not None:
            g_y = g_y * F.silu(block.z)
        torch.mul(g_y.unsqueeze(-2), block.C.unsqueeze(-1), out=block.g)
        sent = work.retreat(sent, block.tokens)
    carries, decay = [g_final], _segment_decay(layout, ops)
    for p in reversed(range(1, layout.count)):
        carries.append(torch.addcmul(sent[:, p], decay[:, p], carries[-1]))
    return torch.stack(carries[::-1], dim=1)


def _forward_chunked(
    scan: ScanOperands, initial_state: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    u = scan.u
    layout = _Layout(u, scan.A.size(1))
    ops = _Operands(layout, scan, doc_position)
    out = layout.empty(u)
    starts = torch.empty(u.size(0), layout.count, layout.chunks, *ops.A_NE.shape, dtype=torch.float32, device=u.device)
    # A CPU's other threads would meet at a barrier after each of thousands of tiny steps.
    with one_torch_thread():
        work = _Work(layout, ops, buffers=2)
        state = _segment_starts(layout, ops, work, initial_state.float().transpose(1, 2))
        for chunks in layout.blocks():
            span = layout.span(chunks)
            starts[:, :, chunks.start] = state
            block = _Block(ops, work, span)
            state = work.advance(starts[:, :, chunks.start], block.tokens)
            starts[:, :, chunks.start + 1 : chunks.stop] = block.x[:, :, CHUNK - 1 : -1 : CHUNK]
            y = torch.matmul(block.C.unsqueeze(-2), block.x).squeeze(-2).addcmul_(block.u, ops.D)
            out[:, :, span] = y if block.z is None else y.mul_(F.silu(block.z))
        final = state[:, -1].transpose(1, 2).contiguous()
    return layout.uncut(out), final, starts.flatten(1, 2)[:, : n_chunks(layout.length, CHUNK)].contiguous()


def _backward_chunked(
    g_out: Tensor, g_final: Tensor, scan: ScanOperands, starts: Tensor, doc_position: Tensor | None = None
) -> tuple[Tensor, ...]:
    u, dt, A, B, C, D, z, dt_bias = scan
    layout = _Layout(u, scan.A.size(1))
    ops = _Operands(layout, scan, doc_position)
    g_out = layout.cut(g_out)
    starts = F.pad(starts, (0, 0, 0, 0, 0, layout.count * layout.chunks - starts.size(1)))
    starts = starts.unflatten(1, (layout.count, layout.chunks))
    g_u, g_dt, g_B, g_C = layout.empty(u), layout.empty(dt), layout.empty(B), layout.empty(C)
    g_z = None if z is None else layout.empty(z)
    g_A, g_D, g_bias = torch.zeros_like(ops.A_NE), torch.zeros_like(ops.D), torch.zeros_like(ops.dt_bias)
    # A CPU's other threads would meet at a barrier after each of thousands of tiny steps.
    with one_torch_thread():
        work = _Work(layout, ops, buffers=3)
        carry = _segment_carries(layout, ops, work, g_out, g_final.float().transpose(1, 2))
        for chunks in reversed(layout.blocks()):
            span, start = layout.span(chunks), starts[:, :, chunks.start]
            block = _Block(ops, work, span)
            work.advance_chunks(starts[:, :, chunks.start : chunks.stop], block.tokens)
            g_y = g_out[:, :, span].float()
            if block.z is not None and g_z is not None:
                y = torch.matmul(block.C.unsqueeze(-2), block.x).squeeze(-2).addcmul_(block.u, ops.D)
                silu, slope = _silu_gradient(block.z)
                g_z[:, :, span] = y.mul_(g_y).mul_(slope)
                g_y = silu.mul_(g_y)
            g_D += (g_y * block.u).sum((0, 1, 2))
            torch.mul(g_y.unsqueeze(-2), block.C.unsqueeze(-1), out=block.g)
            carry = work.retreat(carry, block.tokens)
            # Row times matrix: a CPU takes ten times as long for matrix times column.
            g_C[:, :, span] = torch.matmul(g_y.unsqueeze(-2), block.x.mT).squeeze(-2)
            g_B[:, :, span] = torch.matmul(block.inflow.unsqueeze(-2), block.g.mT).squeeze(-2)
            g_inflow = torch.matmul(block.B.unsqueeze(-2), block.g).squeeze(-2)
            # The gradient of the exponent dt·A, in the memory of g: a state's predecessor is the row before it.
            g = block.g.mul_(block.decay)
            g[:, :, 1:] *= block.x[:, :, :-1]
            g[:, :, 0] *= start
            g_step = torch.mul(g, ops.A_NE, out=block.decay).sum(-2).addcmul_(g_inflow, block.u)
            g_A += g.mul_(block.step.unsqueeze(-2)).sum((0, 1, 2))
            g_u[:, :, span] = torch.addcmul(g_y * ops.D, g_inflow, block.step)
            g_raw = g_step.mul_(block.raw.sigmoid_())
            g_bias += g_raw.sum((0, 1, 2))
            g_dt[:, :, span] = g_raw
    return (
        layout.uncut(g_u),
        layout.uncut(g_dt),
        g_A.t().contiguous().to(A.dtype),
        layout.uncut(g_B),
        layout.uncut(g_C),
        g_D.to(D.dtype),
        u.new_empty(0) if g_z is None else layout.uncut(g_z),
        g_bias.to(dt_bias.dtype),
        carry[:, 0].transpose(1, 2).contiguous(),
    )


selective_scan_chunked = make_scan_op("selective_scan_chunked", _forward_chunked, _backward_chunked, CHUNK)
BACKEND = Backend("plain PyTorch, chunk by chunk", lambda: selective_scan_chunked, auto={"any": 10})
