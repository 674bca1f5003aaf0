"""Every backend of the causal convolution against the naive sum, and the naive sum against torch's conv1d."""

import functools
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from op_cases import RATIO, assert_close, cpu_backends, gpu_backends, on, outputs_and_gradients, random

from hymba_lightning.ops.causal_conv1d import causal_conv1d
from hymba_lightning.ops.registry import OPERATIONS, BackendUnavailableError, choose

# (B, T, E, W): odd sizes, one token, fewer tokens than the state holds, several runs, many channels, one tap.
EVERY = cpu_backends("causal_conv1d")
SHAPES = [(2, 63, 60, 4), (1, 1, 16, 4), (2, 2, 20, 4), (1, 300, 16, 3), (2, 129, 100, 4), (1, 5, 8, 1), (1, 9, 8, 8)]


def case(batch, length, channels, taps, dtype=torch.float32, device="cpu"):
    make = functools.partial(random, device=device)
    return {
        "x_BTE": make(batch, length, channels, dtype=dtype),
        "weight_EW": make(channels, taps),
        "bias_E": make(channels),
        "initial_state_BEW1": make(batch, channels, taps - 1, dtype=dtype),
    }


def compare(backend, operands, ratio, activation):
    batch, length, channels = operands["x_BTE"].shape
    device = operands["x_BTE"].device
    weights = (
        random(batch, length, channels, device=device, seed=5),
        random(*operands["initial_state_BEW1"].shape, device=device, seed=6),
    )
    got, got_gradients = outputs_and_gradients(
        functools.partial(causal_conv1d, backend=backend, return_state=True, activation=activation), operands, weights
    )
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(causal_conv1d, backend="naive", return_state=True, activation=activation), operands, weights
    )
    for name, actual, reference in zip(("y", "state"), got, expected, strict=True):
        assert_close(name, actual, reference, ratio)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", got_gradients[name], reference, ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), on("cpu", *EVERY) + on("cuda", *gpu_backends("causal_conv1d")))
def test_backend_matches_naive(backend, shape, dtype, device):
    compare(backend, case(*shape, dtype=dtype, device=device), RATIO[dtype], "silu")


@pytest.mark.parametrize("backend", EVERY)
def test_without_activation(backend):
    compare(backend, case(2, 63, 60, 4), RATIO[torch.float32], None)


@pytest.mark.parametrize("activation", ["silu", None])
def test_naive_is_a_convolution_padded_on_the_left(activation):
    operands = case(2, 9, 5, 4)
    y, state = causal_conv1d(**operands, activation=activation, return_state=True, backend="naive")
    padded = torch.cat([operands["initial_state_BEW1"], operands["x_BTE"].transpose(1, 2)], dim=2)
    expected = F.conv1d(padded, operands["weight_EW"][:, None], operands["bias_E"], groups=5).transpose(1, 2)
    torch.testing.assert_close(y, F.silu(expected) if activation else expected)
    assert torch.equal(state, padded[:, :, -3:])


@pytest.mark.parametrize("backend", ["naive", *EVERY])
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 130)], ids=str)
def test_sequence_may_be_cut_anywhere(backend, cuts):
    operands = case(2, 140, 20, 4)

    def whole(**call):
        return causal_conv1d(**call, backend=backend, return_state=True)

    def in_pieces(x_BTE, initial_state_BEW1, **call):
        pieces, state = [], initial_state_BEW1
        for first, last in itertools.pairwise([0, *cuts, 140]):
            y, state = causal_conv1d(
                x_BTE[:, first:last], **call, initial_state_BEW1=state, backend=backend, return_state=True
            )
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    weights = random(2, 140, 20, seed=5), random(2, 20, 3, seed=6)
    expected, expected_gradients = outputs_and_gradients(whole, operands, weights)
    got, gradients = outputs_and_gradients(in_pieces, operands, weights)
    for actual, reference in zip(got, expected, strict=True):
        assert_close("result", actual, reference, RATIO[torch.float32])
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", gradients[name], reference, RATIO[torch.float32])


@pytest.mark.parametrize("backend", ["naive", *EVERY])
def test_input_may_be_a_slice_of_a_projection(backend):
    operands = case(2, 20, 16, 4)
    wide = torch.cat([random(2, 20, 16, seed=9), operands["x_BTE"]], dim=-1)
    sliced = operands | {"x_BTE": wide[..., 16:]}
    assert torch.equal(causal_conv1d(**sliced, backend=backend), causal_conv1d(**operands, backend=backend))


@pytest.mark.parametrize("backend", ["naive", *EVERY])
def test_missing_state_is_zero_and_y_alone_is_a_tensor(backend):
    operands = case(1, 5, 16, 4)
    del operands["initial_state_BEW1"]
    y = causal_conv1d(**operands, backend=backend)
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, causal_conv1d(**operands, initial_state_BEW1=torch.zeros(1, 16, 3), backend=backend))


def test_errors_name_what_is_wrong():
    operands = case(1, 6, 4, 4)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, not 'gelu'"):
        causal_conv1d(**operands, activation="gelu")
    for key, shape in (("weight_EW", (5, 4)), ("bias_E", (4, 1)), ("initial_state_BEW1", (1, 3, 4))):
        with pytest.raises(ValueError, match=f"causal_conv1d: {key} has shape"):
            causal_conv1d(**operands | {key: torch.zeros(shape)})
    with pytest.raises(ValueError, match="no tokens"):
        causal_conv1d(**operands | {"x_BTE": torch.zeros(1, 0, 4)})
    with pytest.raises(ValueError, match="no backend 'cudnn'"):
        causal_conv1d(**operands, backend="cudnn")


def test_automatic_choice_and_refusals(monkeypatch):
    installed = set()
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: package in installed)
    pick = functools.partial(choose, "causal_conv1d", "auto")
    assert (pick("cpu"), pick("cuda"), pick("mps")) == ("torch", "torch", "torch")
    with pytest.raises(BackendUnavailableError, match="pip install causal-conv1d"):
        choose("causal_conv1d", "causal_conv1d", "cuda")
    installed.update({"numba", "causal_conv1d"})
    assert (pick("cpu"), pick("cuda")) == ("numba", "causal_conv1d")
    assert pick("cuda", taps=5, channels=8, documents=False) == "torch"
    with pytest.raises(BackendUnavailableError, match="2 to 4 taps"):
        choose("causal_conv1d", "causal_conv1d", "cuda", taps=5, channels=8, documents=False)
    installed.add("triton")
    assert pick("cuda") == "triton"
    assert {"naive", "torch", "numba", "triton", "causal_conv1d"} <= set(OPERATIONS["causal_conv1d"])


class PackageConv:
    """A stand-in for causal-conv1d's autograd.Function: its channels-last layout (B, E, T), and our sums inside."""

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation):
        from hymba_lightning.ops.causal_conv1d import backend_torch as ours

        assert seq_idx is None
        assert final_states_out is None
        assert return_final_states
        for channels_last in (x, initial_states):
            assert channels_last.stride(1) == 1
        assert initial_states.requires_grad
        ctx.silu = activation == "silu"
        ctx.save_for_backward(x.transpose(1, 2), weight, bias, initial_states.detach())
        x, weight, bias, state = ctx.saved_tensors
        y, final = ours._forward(x, weight, bias, ctx.silu, state)
        return y.transpose(1, 2), final

    @staticmethod
    def backward(ctx, g_y, g_final):
        from hymba_lightning.ops.causal_conv1d import backend_torch as ours

        assert g_final.stride(1) == 1
        x, weight, bias, state = ctx.saved_tensors
        g_x, g_weight, g_bias, g_state = ours._backward(g_y.transpose(1, 2), g_final, x, weight, bias, ctx.silu, state)
        return g_x.transpose(1, 2), g_weight, g_bias, None, g_state, None, None, None


@pytest.mark.parametrize("activation", ["silu", None])
def test_package_adapter_lays_the_operands_out_as_the_package_wants(monkeypatch, activation):
    from hymba_lightning.ops.causal_conv1d.backend_causal_conv1d import causal_conv1d_package

    interface = types.ModuleType("causal_conv1d.causal_conv1d_interface")
    interface.CausalConv1dFn = PackageConv
    for module in (types.ModuleType("causal_conv1d"), interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    operands = case(2, 20, 8, 4)
    weights = random(2, 20, 8, seed=5), random(2, 8, 3, seed=6)

    def through_package(x_BTE, weight_EW, bias_E, initial_state_BEW1):
        return causal_conv1d_package(x_BTE, weight_EW, bias_E, activation == "silu", initial_state_BEW1)

    got, gradients = outputs_and_gradients(through_package, operands, weights)
    expected, expected_gradients = outputs_and_gradients(
        functools.partial(causal_conv1d, backend="naive", return_state=True, activation=activation), operands, weights
    )
    for actual, reference in zip(got, expected, strict=True):
        assert_close("result", actual, reference, 1e-6)
    for name, reference in expected_gradients.items():
        assert_close(f"gradient of {name}", gradients[name], reference, 1e-6)


def test_loading_every_backend_leaves_the_function_its_name():
    """A submodule named like the function would take its place in the package once it is imported."""
    from hymba_lightning.ops import causal_conv1d as folder

    assert callable(folder.causal_conv1d)
