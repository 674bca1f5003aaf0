"""The ops are proper torch.library operators: one compiled graph holds them all, forward and backward."""

import pytest
import torch
from op_cases import random
from torch import nn
from torch._dynamo.utils import counters

from hymba_lightning.ops.causal_conv1d import causal_conv1d
from hymba_lightning.ops.scaled_sum import scaled_sum
from hymba_lightning.ops.selective_scan import selective_scan
from hymba_lightning.ops.sliding_window import sliding_window_attention
from hymba_lightning.ops.softcapped_cross_entropy import softcapped_cross_entropy


class Layer(nn.Module):
    """A small mixer with a loss that uses every op, the window attention also as a global layer."""

    def __init__(self, scan_backend, conv_backend):
        super().__init__()
        self.backends = scan_backend, conv_backend
        self.project_in, self.project_x = nn.Linear(16, 32), nn.Linear(16, 16 + 8)
        self.project_qkv = nn.Linear(16, 32)
        self.conv_weight, self.conv_bias = nn.Parameter(random(16, 4)), nn.Parameter(random(16))
        self.A_log, self.D, self.dt_bias = (nn.Parameter(x) for x in (random(16, 4), random(16), random(16)))

    def forward(self, x_BTD):
        u, z = self.project_in(x_BTD).chunk(2, dim=-1)
        u, conv_state = causal_conv1d(u, self.conv_weight, self.conv_bias, return_state=True, backend=self.backends[1])
        dt, B, C = self.project_x(u).split([16, 4, 4], dim=-1)
        y, state = selective_scan(
            u,
            dt,
            -self.A_log.exp(),
            B,
            C,
            self.D,
            z,
            dt_bias_E=self.dt_bias,
            return_state=True,
            backend=self.backends[0],
        )
        q, k, v = self.project_qkv(y).split([16, 8, 8], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 4)) for part in (q, k, v))
        local = sliding_window_attention(q, k, v, window=5)
        everything = sliding_window_attention(q, k, v, window=None)
        out = (local + everything).flatten(2)
        nats_N = softcapped_cross_entropy(out.flatten(0, 1), torch.arange(out.size(0) * out.size(1)) % 16, cap=5.0)
        return nats_N, state, conv_state


@pytest.mark.parametrize(("scan_backend", "conv_backend"), [("numba", "numba"), ("chunked", "torch"), ("auto", "auto")])
def test_compiled_graph_has_no_break_and_the_same_gradients(scan_backend, conv_backend):
    layer, x = Layer(scan_backend, conv_backend), random(2, 21, 16).requires_grad_()
    weights = random(42, seed=1), random(2, 16, 4), random(2, 16, 3)

    def results(module):
        outputs = module(x)
        sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
        gradients = [parameter.grad.clone() for parameter in (x, *layer.parameters())]
        x.grad = None
        layer.zero_grad()
        return [*outputs, *gradients]

    eager = results(layer)
    torch._dynamo.reset()
    counters.clear()
    compiled = results(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for actual, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_length_that_varies_breaks_no_graph():
    def parts(x_BTD):
        q_BTHK = x_BTD.unflatten(-1, (-1, 32))
        summed, _ = scaled_sum(x_BTD, x_BTD, None, torch.ones(64))
        return summed, sliding_window_attention(q_BTHK, q_BTHK, q_BTHK, window=5)

    torch._dynamo.reset()
    compiled = torch.compile(parts, fullgraph=True, backend="eager")
    # From the second length on the compiler takes it for a variable.
    for length in (20, 33, 47):
        x_BTD = random(2, length, 64)
        for actual, expected in zip(compiled(x_BTD), parts(x_BTD), strict=True):
            torch.testing.assert_close(actual, expected)


def _scan_operands(gated):
    return (
        random(2, 33, 20),
        random(2, 33, 20),
        -random(20, 3).abs(),
        random(2, 33, 3),
        random(2, 33, 3),
        random(20),
        random(2, 33, 20) if gated else None,
        random(20),
        random(2, 20, 3),
    )


POSITIONS = (torch.arange(33, dtype=torch.int32) % 9).repeat(2, 1)
CALLS = {
    "selective_scan_numba": _scan_operands(True),
    "selective_scan_chunked": _scan_operands(True),
    "selective_scan_chunked without gate": _scan_operands(False),
    "selective_scan_numba of documents": (*_scan_operands(True), POSITIONS),
    "selective_scan_chunked of documents": (*_scan_operands(True), POSITIONS),
    "causal_conv1d_numba of documents": (
        random(2, 33, 20),
        random(20, 4),
        random(20),
        True,
        random(2, 20, 3),
        POSITIONS,
    ),
    "sliding_window_blocked of documents": (
        random(2, 33, 4, 8),
        random(2, 40, 2, 8),
        random(2, 40, 2, 8),
        7,
        0.5,
        POSITIONS,
    ),
    "causal_conv1d_numba": (random(2, 33, 20), random(20, 4), random(20), True, random(2, 20, 3)),
    "causal_conv1d_torch": (random(2, 33, 20), random(20, 4), random(20), False, random(2, 20, 3)),
    "softcapped_cross_entropy_numba": (random(33, 32), torch.arange(33) % 32, 30.0),
    "scaled_sum_numba": (random(2, 33, 32), random(2, 33, 32), random(32), random(32), True, 1e-6),
    "scaled_sum_numba without norm and gain": (random(2, 33, 32), random(2, 33, 32), None, random(32), False, 0.0),
    "rotary_norm_numba": (random(2, 33, 3, 32), random(3), random(33, 1, 1, 16), random(33, 1, 2, 16), 1e-6),
    "leaky_square_mlp_blocked": (random(33, 20), random(40, 20), random(20, 40), 0.3),
    "softcapped_cross_entropy_torch": (random(33, 20), torch.arange(33) % 20, 30.0),
    "sliding_window_numba of documents": (
        random(2, 33, 4, 8),
        random(2, 40, 2, 8),
        random(2, 40, 2, 8),
        7,
        0.5,
        POSITIONS,
    ),
    "sliding_window_blocked": (random(2, 33, 4, 8), random(2, 40, 2, 8), random(2, 40, 2, 8), 7, 0.5),
}


@pytest.mark.parametrize("call", CALLS)
def test_operators_pass_torchs_own_check(call):
    import hymba_lightning.ops.causal_conv1d.backend_torch
    import hymba_lightning.ops.causal_conv1d.loops
    import hymba_lightning.ops.leaky_square_mlp.backend_blocked
    import hymba_lightning.ops.rotary_norm.loops
    import hymba_lightning.ops.scaled_sum.loops
    import hymba_lightning.ops.selective_scan.backend_chunked
    import hymba_lightning.ops.selective_scan.loops
    import hymba_lightning.ops.sliding_window.backend_blocked
    import hymba_lightning.ops.sliding_window.loops
    import hymba_lightning.ops.softcapped_cross_entropy.backend_torch
    import hymba_lightning.ops.softcapped_cross_entropy.loops  # noqa: F401

    operator = getattr(torch.ops.hymba, call.split()[0]).default
    arguments = tuple(
        x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in CALLS[call]
    )
    torch.library.opcheck(operator, arguments)
