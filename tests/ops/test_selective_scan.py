"""Every backend of the selective scan against the naive loop, and the naive loop against its formula."""

import functools
import itertools
import math
import sys
import types

import pytest
import torch
from document_cases import assert_same
from op_cases import RATIO, assert_close, cpu_backends, gpu_backends, on, outputs_and_gradients, random

from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose
from hymba_lightning.ops.selective_scan import backend_chunked as chunked
from hymba_lightning.ops.selective_scan import selective_scan
from hymba_lightning.ops.selective_scan.operator import ScanOperands

# Whatever the table has; "segments" is explained at `usable`.
EVERY = [*cpu_backends("selective_scan"), "segments"]
# (B, T, E, N): odd sizes, one token, a whole chunk, chunks and a rest, more channels than a work item.
SHAPES = [(2, 63, 60, 5), (1, 1, 16, 8), (2, 64, 16, 1), (1, 150, 20, 3), (2, 67, 200, 16)]


def case(batch, length, channels, states, dtype=torch.float32, device="cpu", gated=True):
    """Operands of a call; the time steps after softplus lie around 0.1 and A between -3 and 0."""
    make = functools.partial(random, device=device)
    return {
        "u_BTE": make(batch, length, channels, dtype=dtype),
        "dt_BTE": make(batch, length, channels, dtype=dtype, seed=1),
        "A_EN": -make(channels, states).abs(),
        "B_BTN": make(batch, length, states, dtype=dtype),
        "C_BTN": make(batch, length, states, dtype=dtype, seed=1),
        "D_E": make(channels),
        "z_BTE": make(batch, length, channels, dtype=dtype, seed=2) if gated else None,
        "dt_bias_E": make(channels, seed=3) - 2,
        "initial_state_BEN": make(batch, channels, states),
    }


@pytest.fixture
def usable(monkeypatch):
    """Turns a name into the backend argument: "segments" is `chunked` laid out as on a GPU, one chunk to a segment."""

    def backend(name):
        if name == "segments":
            monkeypatch.setattr(chunked, "chunks_per_segment", lambda length, device_type: 1)
        return "chunked" if name == "segments" else name

    return backend


def compare(backend, operands, weights, ratio, **options):
    got, got_gradients = outputs_and_gradients(
        functools.partial(selective_scan, backend=backend, return_state=True, **options), operands, weights
    )
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(selective_scan, backend="naive", return_state=True, **options), operands, weights
    )
    for name, actual, reference in zip(("out", "state"), got, expected, strict=True):
        assert_close(name, actual, reference, ratio)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", got_gradients[name], reference, ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "device"), on("cpu", *EVERY) + on("cuda", *gpu_backends("selective_scan")))
def test_backend_matches_naive(name, shape, dtype, device, usable):
    batch, length, channels, states = shape
    operands = case(*shape, dtype=dtype, device=device)
    weights = random(batch, length, channels, device=device), random(batch, channels, states, device=device)
    compare(usable(name), operands, weights, RATIO[dtype])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("through", ["out", "state"])
def test_gradient_through_one_result_only(name, through, usable):
    operands = case(2, 70, 20, 3, gated=through == "state")
    weights = (random(2, 70, 20), None) if through == "out" else (None, random(2, 20, 3))
    backend = usable(name)
    if through == "state":
        # C, D and the gate have no part in the state: their gradients are zeros, or nothing at all as in naive.
        _, gradients = outputs_and_gradients(
            functools.partial(selective_scan, backend=backend, return_state=True), operands, weights
        )
        for dead in ("C_BTN", "D_E"):
            assert gradients[dead] is None or not gradients[dead].any()
        live = {key: operands[key] for key in operands if key not in ("C_BTN", "D_E", "z_BTE")}
        fixed = {"C_BTN": operands["C_BTN"], "D_E": operands["D_E"], "z_BTE": None}
        compare(backend, live, weights, RATIO[torch.float32], **fixed)
    else:
        compare(backend, operands, weights, RATIO[torch.float32])


@pytest.mark.parametrize("name", ["naive", *EVERY])
@pytest.mark.parametrize("cuts", [(1,), (64,), (5, 63, 64, 129)], ids=str)
def test_sequence_may_be_cut_anywhere(name, cuts, usable):
    backend = "naive" if name == "naive" else usable(name)
    operands = case(2, 131, 20, 3)
    edges = [0, *cuts, 131]

    def whole(**call):
        return selective_scan(**call, backend=backend, return_state=True)

    def in_pieces(initial_state_BEN, **call):
        pieces, state = [], initial_state_BEN
        for first, last in itertools.pairwise(edges):
            piece = {key: x[:, first:last] if key[-4:-1] == "_BT" else x for key, x in call.items()}
            out, state = selective_scan(**piece, initial_state_BEN=state, backend=backend, return_state=True)
            pieces.append(out)
        return torch.cat(pieces, dim=1), state

    weights = random(2, 131, 20), random(2, 20, 3)
    expected, expected_gradients = outputs_and_gradients(whole, operands, weights)
    got, gradients = outputs_and_gradients(in_pieces, operands, weights)
    for actual, reference in zip(got, expected, strict=True):
        assert_close("result", actual, reference, RATIO[torch.float32])
    for key, reference in expected_gradients.items():
        assert_close(f"gradient of {key}", gradients[key], reference, RATIO[torch.float32])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_steps_and_rates_neither_overflow_nor_vanish_wrongly(name, size, usable):
    operands = case(1, 140, 16, 4)
    operands["dt_BTE"] = operands["dt_BTE"] * size
    operands["A_EN"] = operands["A_EN"] * size
    compare(usable(name), operands, (random(1, 140, 16), random(1, 16, 4)), RATIO[torch.float32])


@pytest.mark.parametrize("name", EVERY)
def test_not_a_number_is_not_swallowed(name, usable):
    operands = case(1, 70, 16, 2)
    operands["dt_BTE"][0, 10, 3] = math.nan
    out = selective_scan(**operands, backend=usable(name))
    assert out[0, 10:, 3].isnan().all()
    assert out[0, :10].isfinite().all()
    assert out[0, :, 4:].isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_operands_may_be_slices_of_a_projection(name, usable):
    operands = case(2, 66, 16, 3)
    wide = torch.cat([operands["z_BTE"], operands["u_BTE"]], dim=-1)
    narrow = torch.cat([operands["B_BTN"], operands["C_BTN"], operands["dt_BTE"]], dim=-1)
    sliced = operands | {
        "z_BTE": wide[..., :16],
        "u_BTE": wide[..., 16:],
        "B_BTN": narrow[..., :3],
        "C_BTN": narrow[..., 3:6],
        "dt_BTE": narrow[..., 6:],
        "A_EN": operands["A_EN"].t().contiguous().t(),
    }
    backend = usable(name)
    for actual, expected in zip(
        selective_scan(**sliced, backend=backend, return_state=True),
        selective_scan(**operands, backend=backend, return_state=True),
        strict=True,
    ):
        assert_close("result", actual, expected, 1e-7)


def foreach_at_once(xs, decays, before):
    """What foreach may become: every result from the old values."""
    results = [torch.addcmul(*operands) for operands in zip(xs, decays, before, strict=True)]
    for x, result in zip(xs, results, strict=True):
        x.copy_(result)


@pytest.mark.parametrize("foreach", [None, foreach_at_once], ids=["in order", "at once"])
@pytest.mark.parametrize(
    ("shape", "block"), [((2, 330, 20, 3), 4), ((1, 257, 16, 2), 4), ((3, 200, 700, 2), 1)], ids=str
)
def test_chunked_in_blocks_with_and_without_foreach(foreach, shape, block, monkeypatch):
    batch, length, channels, states = shape
    operands = case(*shape)
    assert chunked._Layout(operands["u_BTE"], states).block == block
    if foreach is not None:
        monkeypatch.setattr(torch, "_foreach_addcmul_", foreach)
    chunked._foreach_keeps_order.cache_clear()
    try:
        # A torch whose foreach works otherwise costs speed, not results: this says so.
        assert chunked._foreach_keeps_order() == (foreach is None)
        compare(
            "chunked",
            operands,
            (random(batch, length, channels), random(batch, channels, states)),
            RATIO[torch.float32],
        )
    finally:
        chunked._foreach_keeps_order.cache_clear()


def test_long_sequences_agree_between_backends():
    """Rounding must not pile up over 16,384 tokens: two orders of summation agree about as well as over a hundred."""
    operands = case(1, 16384, 16, 2)
    weights = random(1, 16384, 16), random(1, 16, 2)
    results = [
        outputs_and_gradients(functools.partial(selective_scan, backend=backend, return_state=True), operands, weights)
        for backend in ("chunked", "numba")
    ]
    for key, reference in results[0][1].items():
        assert_close(f"gradient of {key}", results[1][1][key], reference, 2e-5)


def test_result_does_not_depend_on_the_number_of_threads():
    operands, backend = case(1, 1100, 256, 8), "numba"
    weights = random(1, 1100, 256), random(1, 256, 8)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(
                outputs_and_gradients(
                    functools.partial(selective_scan, backend=backend, return_state=True), operands, weights
                )
            )
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])


@pytest.mark.parametrize("name", ["chunked", "numba"])
def test_backward_keeps_operands_and_one_state_a_chunk(name, usable):
    operands = {key: x.requires_grad_() for key, x in case(1, 512, 32, 8).items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        selective_scan(**operands, backend=usable(name))
    elements = sum(x.numel() for x in kept.values())
    assert elements <= sum(x.numel() for x in operands.values()) + 512 // 64 * 32 * 8


def test_doubling_has_second_derivatives_and_goes_through_torch_func():
    operands = case(3, 11, 4, 2)
    fixed = {key: operands[key] for key in ("A_EN", "D_E", "dt_bias_E")}
    direction = random(3, 11, 4, seed=9)

    def loss(u, backend, rows=slice(None)):
        sequence = {key: x[rows] for key, x in operands.items() if key not in (*fixed, "u_BTE")}
        return selective_scan(u, **sequence, **fixed, backend=backend).square().sum()

    # dt moves too, so that the second derivative is no constant.
    def curvature(backend):
        def gradient(dt):
            return torch.func.grad(
                lambda dt: selective_scan(**operands | {"dt_BTE": dt}, backend=backend).square().sum()
            )(dt)

        return torch.func.jvp(gradient, (operands["dt_BTE"],), (direction,))[1]

    assert_close("Hessian times vector", curvature("doubling"), curvature("naive"), 1e-5)
    each = torch.func.vmap(lambda u: loss(u[None], "doubling", slice(0, 1)))(operands["u_BTE"])
    one_by_one = torch.stack([loss(u[None], "naive", slice(0, 1)) for u in operands["u_BTE"]])
    torch.testing.assert_close(each, one_by_one)


def test_naive_follows_the_formula():
    dt = math.log1p(math.exp(0.3 - 1))
    column = {"u_BTE": [2.0, -1.0], "dt_BTE": [0.3, 0.3], "z_BTE": [0.5, 0.5], "B_BTN": [3.0, 1.0], "C_BTN": [1.0, 4.0]}
    h1 = math.exp(dt * -0.5) * 10 + dt * 3 * 2
    h2 = math.exp(dt * -0.5) * h1 + dt * 1 * -1
    gate = 0.5 / (1 + math.exp(-0.5))
    operands = {key: torch.tensor(x).view(1, 2, 1) for key, x in column.items()}
    out, state = selective_scan(
        **operands,
        A_EN=torch.tensor([[-0.5]]),
        D_E=torch.tensor([7.0]),
        dt_bias_E=torch.tensor([-1.0]),
        initial_state_BEN=torch.tensor([[[10.0]]]),
        return_state=True,
        backend="naive",
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([(h1 + 14) * gate, (4 * h2 - 7) * gate]))
    torch.testing.assert_close(state.flatten(), torch.tensor([h2]))


@pytest.mark.parametrize("name", ["naive", *cpu_backends("selective_scan")])
def test_missing_state_is_zero_and_out_alone_is_a_tensor(name):
    operands = case(1, 5, 16, 2)
    del operands["initial_state_BEN"]
    out = selective_scan(**operands, backend=name)
    zero = selective_scan(**operands, initial_state_BEN=torch.zeros(1, 16, 2), backend=name)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, zero)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=rf"no backend 'cuda'; choose auto or one of {', '.join(OPERATIONS['selective_scan'])}"
    ):
        selective_scan(**case(1, 2, 4, 1), backend="cuda")
    assert {"naive", "chunked", "numba", "triton", "mamba_ssm"} <= set(OPERATIONS["selective_scan"])


def test_unavailable_backend_names_the_remedy(monkeypatch):
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: False)
    with pytest.raises(BackendUnavailableError, match="runs on cuda tensors, these are on cpu"):
        selective_scan(**case(1, 2, 4, 1), backend="mamba_ssm")
    for backend, device, remedy in (
        ("mamba_ssm", "cuda", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm"),
        ("triton", "cuda", "pip install triton"),
        ("numba", "cpu", "pip install numba"),
    ):
        with pytest.raises(BackendUnavailableError, match=remedy):
            choose("selective_scan", backend, device)


def test_automatic_choice(monkeypatch):
    installed = set()
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package in installed)
    pick = functools.partial(choose, "selective_scan", "auto")
    assert (pick("cpu"), pick("cuda"), pick("mps")) == ("chunked", "chunked", "chunked")
    installed.update({"numba", "mamba_ssm"})
    assert (pick("cpu"), pick("cuda")) == ("numba", "chunked"), "mamba-ssm is there, but without its extension"
    installed.add("selective_scan_cuda")
    assert pick("cuda") == "mamba_ssm"
    plain = {"initial_state": False, "state_gradient": False, "documents": False}
    assert pick("cuda", **plain | {"initial_state": True}) == "chunked"
    assert pick("cuda", **plain | {"state_gradient": True}) == "chunked"
    installed.add("triton")
    assert pick("cuda", **plain | {"initial_state": True}) == "triton"
    with pytest.raises(BackendUnavailableError, match="starts from a zero state; use backend 'triton'"):
        choose("selective_scan", "mamba_ssm", "cuda", **plain | {"initial_state": True})


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("dt_BTE", (1, 5, 4)),
        ("A_EN", (5, 2)),
        ("B_BTN", (1, 6, 3)),
        ("C_BTN", (1, 2, 6)),
        ("D_E", (3,)),
        ("z_BTE", (2, 6, 4)),
        ("dt_bias_E", (4, 1)),
        ("initial_state_BEN", (1, 2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_named(key, shape):
    operands = case(1, 6, 4, 2) | {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"selective_scan: {key} has shape"):
        selective_scan(**operands)


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        selective_scan(**case(1, 0, 4, 2))


class PackageScan:
    """A stand-in for mamba-ssm's autograd.Function: its layout (B, X, T), and our chunked scan inside."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert delta_softplus
        for x in (u, delta, B, C, z):
            assert x.is_contiguous()
            assert x.dtype == u.dtype
        ours = [x.transpose(1, 2) for x in (u, delta, B, C, z)]
        ctx.save_for_backward(*ours[:2], A, *ours[2:4], D, ours[4], delta_bias)
        out, state, ctx.starts = chunked._forward_chunked(
            ScanOperands(*ctx.saved_tensors), torch.zeros(u.size(0), *A.shape)
        )
        return (out.transpose(1, 2), state) if return_last_state else out.transpose(1, 2)

    @staticmethod
    def backward(ctx, g_out):
        g_final = torch.zeros(g_out.size(0), *ctx.saved_tensors[2].shape)
        gradients = chunked._backward_chunked(
            g_out.transpose(1, 2), g_final, ScanOperands(*ctx.saved_tensors), ctx.starts
        )
        turned = [g.transpose(1, 2) if g.dim() == 3 else g for g in gradients[:8]]
        return (*turned, None, None)


def test_mamba_ssm_adapter_lays_the_operands_out_as_the_package_wants(monkeypatch):
    from hymba_lightning.ops.selective_scan.backend_mamba_ssm import selective_scan_mamba_ssm

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.SelectiveScanFn = PackageScan
    for module in (types.ModuleType("mamba_ssm"), types.ModuleType("mamba_ssm.ops"), interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    operands = case(2, 20, 8, 3)
    del operands["initial_state_BEN"]
    order = ("u_BTE", "dt_BTE", "A_EN", "B_BTN", "C_BTN", "D_E", "z_BTE", "dt_bias_E")
    weights = random(2, 20, 8), None

    def through_package(**call):
        return selective_scan_mamba_ssm(*(call[key] for key in order))

    naive = functools.partial(selective_scan, backend="naive", return_state=True)
    expected = outputs_and_gradients(naive, operands, weights)
    assert_same(outputs_and_gradients(through_package, operands, weights), expected, 1e-6)
    leaves = [operands[key].requires_grad_() for key in order]
    with pytest.raises(RuntimeError, match="does not require grad"):
        selective_scan_mamba_ssm(*leaves)[1].sum().backward()
