"""Operators that write their gradients into a compiled graph's concatenation: in Triton's interpreter, on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

pytestmark = needs_triton
B, T, D, HEADS, KV_HEADS, K, E, N, W = 2, 21, 8, 4, 2, 32, 32, 4, 4
SIZES = {"q": HEADS * K, "k": KV_HEADS * K, "v": KV_HEADS * K, "u": E, "z": E}
# name: what is special, operators that write
CASES = {
    "documents after carried state, cut along heads, normalised and turned": (
        ("documents", "state", "heads", "turned"),
        5,
    ),
    "values that something else reads too, an input that is scaled": (("read twice",), 1),
    "lengths that vary": (("dynamic",), 0),
}


def mixer(weights, x, special):
    """A loss that depends on all five pieces of one product, and on the states after it."""
    from hymba_lightning.model.attention import rope_table
    from hymba_lightning.ops.causal_conv1d import causal_conv1d
    from hymba_lightning.ops.rotary_norm import rotary_norm
    from hymba_lightning.ops.selective_scan import selective_scan
    from hymba_lightning.ops.sliding_window.triton_launches import sliding_window_attention_triton

    product = x @ weights["joint"]
    if "heads" in special:
        pieces = product.unflatten(-1, (-1, K)).split([size // K for size in SIZES.values()], dim=-2)
        q, k, v, u, z = (piece.flatten(-2) for piece in pieces)
    else:
        q, k, v, u, z = product.split(list(SIZES.values()), dim=-1)
    positions = torch.arange(T, dtype=torch.int32).remainder(9).expand(B, T) if "documents" in special else None
    carried = "state" in special
    q, k, v = (piece.unflatten(-1, (-1, K)) for piece in (q, k, v))
    if "turned" in special:
        table = rope_table(0, T, K, 100.0, x.device)
        q = rotary_norm(q, weights["bias"][:HEADS], *table, 1e-6, backend="triton")
        k = rotary_norm(k, None, *table, 1e-6, backend="triton")
    else:
        q, k = q.sin(), k.sin()
    heads = q, k, v
    attended = sliding_window_attention_triton(*heads, window=5, scale=0.3, doc_position_BT=positions)
    convolved, conv_state = causal_conv1d(
        u * 2.0 if "read twice" in special else u,
        weights["taps"],
        weights["bias"],
        activation="silu",
        initial_state_BEW1=weights["conv_state"] if carried else None,
        doc_position_BT=positions,
        return_state=True,
        backend="triton",
    )
    dt, B_BTN, C_BTN = (convolved @ weights["dynamics"]).split([E, N, N], dim=-1)
    y, state = selective_scan(
        convolved,
        dt,
        -weights["A"].exp(),
        B_BTN,
        C_BTN,
        weights["bias"],
        z,
        dt_bias_E=weights["bias"],
        initial_state_BEN=weights["state"] if carried else None,
        doc_position_BT=positions,
        return_state=True,
        backend="triton",
    )
    loss = attended.square().sum() + y.square().sum() + state.square().sum() + conv_state.square().sum()
    return loss + v.sin().sum() if "read twice" in special else loss


def compare(special):
    """A case: ratios of the compiled gradients to those without a compiler, and how many operators wrote theirs."""
    from hymba_lightning.ops.compiling import compiled
    from hymba_lightning.ops.joined_gradients import JoinedGradients
    from hymba_lightning.ops.sliding_window import triton_launches

    tile = triton_launches.Launch(32, 16, 4, 2)
    triton_launches.LAUNCHES = {K: triton_launches.Launches(tile, tile, tile._replace(rows=16))}
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "joint": (D, sum(SIZES.values())),
        "taps": (E, W),
        "bias": (E,),
        "dynamics": (E, E + 2 * N),
        "A": (E, N),
        "conv_state": (B, E, W - 1),
        "state": (B, E, N),
    }
    weights = {name: (0.3 * torch.randn(s, generator=generator)).requires_grad_() for name, s in shapes.items()}
    x = torch.randn(B, T, D, generator=generator, requires_grad=True)
    leaves = {name: leaf for name, leaf in (weights | {"x": x}).items() if "state" in special or "state" not in name}
    writers, added = [], []

    class Counting(JoinedGradients):
        def __call__(self, graph):
            super().__call__(graph)
            graph.lint()
            found = [node for node in graph.nodes if str(node.target).endswith("_backward_into.default")]
            writers.extend(found)
            added.extend(node for node in found if "conv1d" in str(node.target) and len(node.args) == 10)

    torch._inductor.config.post_grad_custom_post_pass = Counting()
    torch._inductor.config.force_disable_caches = True
    torch._dynamo.reset()
    loss = functools.partial(mixer, special=special)
    expected = torch.autograd.grad(loss(weights, x), list(leaves.values()))
    if "dynamic" in special:
        torch._dynamo.mark_dynamic(x, 1)
    run = compiled(loss, dynamic=None if "dynamic" in special else False)
    found = torch.autograd.grad(run(weights, x), list(leaves.values()))
    named = (dict(zip(leaves, gradients, strict=True)) for gradients in (found, expected))
    return {"ratios": differences(*named), "writers": len(writers), "added": len(added)}


def registered():
    """A case: torch's own checks of the operators that write, and what they return and write."""
    from hymba_lightning.ops.causal_conv1d import triton_launches
    from hymba_lightning.ops.operators import WRITERS

    # One program, three tiles.
    triton_launches.TARGET_PROGRAMS = 1
    x, g_y = torch.randn(1, 38, 4), torch.randn(1, 38, 4)
    given = g_y, torch.randn(1, 4, 2), x, torch.randn(4, 3), torch.randn(4), True, torch.randn(1, 4, 2), None
    whole = torch.full((1, 38, 9), 7.0)
    writer = WRITERS[torch.ops.hymba.causal_conv1d_triton_backward.default]
    more = torch.randn(1, 38, 8)[..., ::2]
    for others in ((), (more,)):
        torch.library.opcheck(writer.operator, (*given, whole.clone()[..., 2:6], *others))
    empty, *rest = writer.operator(*given, whole[..., 2:6], more)
    expected = triton_launches._backward(g_y + more, *given[1:])
    found = {"dx": whole[..., 2:6], "around": whole[..., [0, 1, 6, 7, 8]], "nothing": empty}
    found |= {str(number): gradient for number, gradient in enumerate(rest)}
    wanted = {"dx": expected[0], "around": torch.full((1, 38, 5), 7.0), "nothing": torch.empty(0)}
    return {"ratios": differences(found, wanted | {str(n): gradient for n, gradient in enumerate(expected[1:])})}


# Each compiles for half a minute: the first is run with the suite.
FIRST, *OTHERS = CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.more) for name in OTHERS)])
def test_compiled_gradients_agree_and_are_written_in_place_where_they_can_be(name):
    results = collect(__file__, name)[name]
    assert_within(results, 2e-6)
    assert results["writers"] == CASES[name][1]
    # The scan and the projection of its dynamics both find a gradient of what was convolved.
    assert results["added"] == (CASES[name][1] >= 3)


@pytest.mark.slow
def test_an_operator_writes_nothing_but_its_part_and_returns_the_other_gradients():
    assert_within(collect(__file__, "registered")["registered"], 1e-6)


if __name__ == "__main__":
    cases = {name: functools.partial(compare, special) for name, (special, _) in CASES.items()}
    run_cases(cases | {"registered": registered})
