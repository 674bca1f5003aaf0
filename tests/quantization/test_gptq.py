"""GPTQ against a dense statement of it, its gain on correlated inputs, and Hessians against explicit inputs."""

import dataclasses

import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.quantization import load_artifact, save_artifact
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.gptq import (
    SingularHessianError,
    collect_hessians,
    inverse_factor,
    quantize_gptq,
    quantize_with_hessians,
)
from hymba_lightning.quantization.rows import dequantize_rows, quantize_rows


def problem(rows: int = 12, columns: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(500, columns, generator=generator) @ mix * sizes
    return weight, inputs


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weight - rounded) @ inputs.T).square().sum())


def dense_gptq(weight, hessian, scale, q_max, order):
    """Column by column with the inverse of what is left of the Hessian computed anew, in float64."""
    weight, hessian = weight.double().clone(), hessian.double()
    q = torch.zeros_like(weight)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        q[:, column] = (weight[:, column] / scale).round().clamp(-q_max, q_max)
        error = weight[:, column] - q[:, column] * scale
        weight[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return q


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_equals_the_dense_statement(bits, act_order, block):
    weight, inputs = problem()
    hessian = inputs.T @ inputs
    result = quantize_gptq(weight, hessian, bits, act_order=act_order, block=block, damping=0.02)
    damped = hessian.double() + 0.02 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(len(hessian))
    scale = result.scale.double() * 2.0**result.exponent
    expected = dense_gptq(weight, damped, scale, 2 ** (bits - 1) - 1, order)
    # A float32 tie may fall the other way and carry on to the columns after it.
    assert (result.q != expected).float().mean() < 0.01


@pytest.mark.parametrize("columns", [1, 128, 301])
def test_the_factor_of_a_wide_layer_is_that_of_its_inverse_hessian(columns):
    _, inputs = problem(columns=columns)
    hessian = (inputs.T @ inputs).double()
    upper, order = inverse_factor(hessian, 0.01, True)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns))[order][:, order]
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (upper.diagonal() > 0).all()


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.6), (6, 0.5)])
def test_halves_the_output_error_of_rounding_to_nearest(bits, gain):
    weight, inputs = problem(rows=64, columns=96)
    nearest = dequantize_rows(quantize_rows(weight, bits))
    rounded = dequantize_rows(quantize_gptq(weight, inputs.T @ inputs, bits))
    assert output_error(weight, rounded, inputs) < gain * output_error(weight, nearest, inputs)


def test_order_of_columns_by_activation_helps():
    errors = {
        order: sum(
            output_error(weight, dequantize_rows(quantize_gptq(weight, inputs.T @ inputs, 4, act_order=order)), inputs)
            for weight, inputs in (problem(64, 96, seed) for seed in range(4))
        )
        for order in (True, False)
    }
    assert errors[True] < errors[False]


def test_a_white_hessian_is_rounding_to_nearest():
    weight, _ = problem()
    assert torch.equal(quantize_gptq(weight, torch.eye(40) * 7, 6).q, quantize_rows(weight, 6).q)


def test_the_size_of_hessian_and_weight_do_not_matter():
    weight, inputs = problem()
    hessian = inputs.T @ inputs
    plain, scaled = quantize_gptq(weight, hessian, 6), quantize_gptq(weight * 2.0**-20, hessian * 2.0**30, 6)
    assert torch.equal(plain.q, scaled.q)
    assert scaled.exponent == plain.exponent - 20


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    weight, inputs = problem()
    inputs[:, 5] = 0
    result = quantize_gptq(weight, inputs.T @ inputs, 6)
    scale = result.scale.float() * 2.0**result.exponent
    assert torch.equal(result.q[:, 5], (weight[:, 5] / scale).round().clamp(-31, 31).to(torch.int8))


@pytest.mark.parametrize(
    "hessian", [torch.zeros(40, 40), torch.full((40, 40), float("nan")), torch.eye(40) - torch.full((40, 40), 0.075)]
)
def test_hessians_that_determine_nothing_raise(hessian):
    with pytest.raises(SingularHessianError):
        quantize_gptq(problem()[0], hessian, 6, damping=0.0)


def test_the_fallback_to_rounding_is_loud(caplog):
    name, weight = "blocks.0.mlp.fc.weight", problem()[0]
    scheme = QuantizationConfig(keep_float_numel=0)
    result = quantize_with_hessians({name: weight}, {name: torch.zeros(40, 40)}, scheme, {name: Role.MATRIX})
    assert torch.equal(result[name].q, quantize_rows(weight, 6).q)
    assert f"{name} is rounded to nearest" in caplog.text


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Hymba(
        HymbaConfig(
            vocab_size=64,
            n_layers=4,
            d_model=32,
            n_heads=2,
            n_kv_heads=1,
            window=8,
            d_state=4,
            bigram_buckets=32,
            bigram_dim=8,
            kv_share_every=2,
            tie_embeddings=False,
        )
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_hessians_cover_every_linear_and_add_up_over_batches(net):
    ids = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    whole = collect_hessians(net, [ids])
    pieces = collect_hessians(net, ids.split(2))
    linears = {name for name, tensor in net.state_dict().items() if name.endswith(".weight") and tensor.ndim == 2}
    assert set(whole) == linears - {
        name for name in linears if name.endswith(("tok_emb.weight", "table.weight", "dt_proj.weight"))
    }
    for name, hessian in whole.items():
        torch.testing.assert_close(hessian, pieces[name], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_hessians_are_those_of_the_inputs(net, monkeypatch):
    """The output of a linear, recomputed from its Hessian, has the energy that the forward pass really had."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    energy: dict[int, float] = {}
    linear = torch.nn.functional.linear

    def spy(x, weight):
        out = linear(x, weight)
        energy[weight.data_ptr()] = energy.get(weight.data_ptr(), 0.0) + float(out.double().square().sum())
        return out

    hessians = collect_hessians(net, [ids])
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    with torch.no_grad():
        net(ids)
    weights = {
        name: weight.double()
        for name, weight in net.state_dict().items()
        if name in hessians and weight.data_ptr() in energy
    }
    assert len(weights) == 4 * 5 + 2  # x_proj, mamba_out_proj, proj, fc, mlp.proj of each block; bigram, head
    for name, weight in weights.items():
        expected = energy[net.state_dict()[name].data_ptr()]
        assert float(torch.einsum("rc,cd,rd->", weight, hessians[name].double(), weight)) == pytest.approx(
            expected, rel=1e-4
        ), name


def test_branches_side_by_side_with_gates_go_through_the_artifact(tmp_path):
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=64,
        n_layers=2,
        d_model=64,
        n_heads=4,
        n_kv_heads=2,
        window=8,
        bigram_hash=False,
        merge="concat",
        branch_gate=5,
        dynamics_norm=True,
    )
    net = Hymba(config)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 64, (2, 24))
    hessians = collect_hessians(net, [ids])
    assert hessians["blocks.1.attn.proj.weight"].shape == (128, 128)
    scheme = QuantizationConfig(scheme="mixed", gptq=True, limit_bytes=200_000)
    save_artifact(
        tmp_path / "a.hymba",
        net.state_dict(),
        config=config.to_dict(),
        tokenizer={},
        metadata={},
        scheme=scheme,
        hessians=hessians,
    )
    artifact = load_artifact(tmp_path / "a.hymba")
    other = artifact.network()
    torch.testing.assert_close(other.blocks[0].attn.branch_gate, net.blocks[0].attn.branch_gate, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert (other(ids) - net(ids)).norm() < 0.1 * net(ids).norm()


def test_a_shared_projection_has_one_hessian_over_all_its_uses(net):
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    hessians = collect_hessians(net, [ids])
    kv = [hessians[f"blocks.{layer}.attn.kv_proj.weight"] for layer in range(4)]
    queries = [hessians[f"blocks.{layer}.attn.c_q.weight"] for layer in range(4)]
    assert kv[0] is kv[1]
    assert kv[2] is kv[3]
    torch.testing.assert_close(kv[0], queries[0] + queries[1], rtol=1e-4, atol=1e-4)


def test_a_network_rounded_by_gptq_stays_closer(net):
    generator = torch.Generator().manual_seed(4)
    ids, fresh = torch.randint(0, 64, (16, 32), generator=generator), torch.randint(0, 64, (8, 32), generator=generator)
    config = QuantizationConfig(bits=4, keep_float_numel=600, clip_quantile=0.99, float16_names=["tok_emb", "table"])
    state_dict = net.state_dict()
    gptq = quantize_with_hessians(state_dict, collect_hessians(net, [ids]), config, roles_of(net))
    assert torch.equal(gptq["blocks.0.attn.kv_proj.weight"].q, gptq["blocks.1.attn.kv_proj.weight"].q)
    nearest = {name: quantize_rows(state_dict[name], 4, clip_quantile=0.99) for name in gptq}
    with torch.no_grad():
        expected = net(fresh)
        errors = []
        for rounded in (nearest, gptq):
            copy = Hymba(net.config)
            copy.load_state_dict(state_dict | {name: dequantize_rows(tensor) for name, tensor in rounded.items()})
            errors.append(float((copy(fresh) - expected).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_an_artifact_takes_hessians_and_still_keeps_its_limit(net, tmp_path):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (16, 32), generator=generator)
    hessians, state_dict = collect_hessians(net, [ids]), net.state_dict()
    scheme = QuantizationConfig(scheme="gptq", keep_float_numel=600, zstd_level=3, float16_names=["tok_emb", "table"])

    def save(config: QuantizationConfig, hessians: dict | None):
        report = save_artifact(
            tmp_path / "a",
            state_dict,
            config=net.config.to_dict(),
            tokenizer={},
            metadata={},
            scheme=config,
            hessians=hessians,
        )
        return report, load_artifact(tmp_path / "a").state_dict

    report, restored = save(scheme, hessians)
    expected = quantize_with_hessians(state_dict, hessians, scheme, roles_of(net))
    assert len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(restored[name], dequantize_rows(tensor)), name
    limit = round(0.9 * report.bytes)
    tight, coarse = save(dataclasses.replace(scheme, limit_bytes=limit), hessians)
    assert tight.bytes <= limit
    assert tight.coarsen > 1
    nearest, _ = save(dataclasses.replace(scheme, scheme="rows", limit_bytes=limit), None)
    assert tight.coarsen == pytest.approx(nearest.coarsen, rel=0.1)
    # Coarser, and still rounded by GPTQ: its error on the layer's outputs is the smaller one.
    name = "blocks.0.mlp.fc.weight"
    _, plain = save(dataclasses.replace(scheme, scheme="rows", coarsen=tight.coarsen, fit_limit=False), None)
    energy = [
        torch.einsum("rc,cd,rd->", error, hessians[name], error)
        for error in (tensors[name] - state_dict[name] for tensors in (coarse, plain))
    ]
    assert energy[0] < 0.9 * energy[1]


def test_hessians_go_with_the_scheme_that_needs_them(net, tmp_path):
    for scheme, hessians, match in (("gptq", None, "needs Hessians"), ("rows", {}, "takes no Hessians")):
        with pytest.raises(ValueError, match=match):
            save_artifact(
                tmp_path / "a",
                net.state_dict(),
                config=net.config.to_dict(),
                tokenizer={},
                metadata={},
                scheme=QuantizationConfig(scheme=scheme),
                hessians=hessians,
            )
