"""Mixed precision: the limit is kept and used, the loss is the least that it can be, and the same every time."""

import dataclasses
import itertools

import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization import (
    ArtifactTooLargeError,
    QuantizationConfig,
    check_limit,
    inspect_artifact,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.precision import LEAST, Candidate
from hymba_lightning.quantization.rows import as_rows, dequantize_rows
from hymba_lightning.quantization.schemes import calibrate

MIXED = QuantizationConfig(scheme="mixed")


@pytest.fixture(scope="module")
def net():
    """Layers of very different weight in the result, and a projection that two of them share."""
    torch.manual_seed(0)
    net = Hymba(
        HymbaConfig(
            vocab_size=64,
            n_layers=4,
            d_model=48,
            n_heads=2,
            n_kv_heads=1,
            window=8,
            d_state=4,
            bigram_buckets=128,
            bigram_dim=16,
            kv_share_every=2,
        )
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for layer, block in enumerate(net.blocks):
        torch.nn.init.constant_(block.mlp_scale, 0.5 ** (2 * layer))
    return net


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 64, (16, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def known(net, ids):
    """Calibration for GPTQ, and the sensitivities alone."""
    both = calibrate(net, dataclasses.replace(MIXED, gptq=True), [ids])
    return both._asdict(), both._replace(hessians=None)._asdict()


def save(path, net, scheme: QuantizationConfig, budget: int, **calibration):
    scheme = dataclasses.replace(scheme, limit_bytes=budget)
    return save_artifact(
        path, net.state_dict(), config=net.config.to_dict(), tokenizer={}, metadata={}, scheme=scheme, **calibration
    )


def divergence(net, path) -> float:
    """KL in nats a token, on tokens that calibration did not see, of the stored network from `net`."""
    fresh = torch.randint(0, 64, (16, 64), generator=torch.Generator().manual_seed(1))
    stored = Hymba(net.config)
    stored.load_state_dict(load_artifact(path).state_dict)
    with torch.no_grad():
        log_p, log_q = (each(fresh).float().log_softmax(-1) for each in (net, stored))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("budget", "gptq"), [(30_001, False), (44_444, True), (61_803, False), (99_991, True)])
def test_odd_limits_are_kept_and_used(net, known, tmp_path, budget, gptq):
    report = save(tmp_path / "a", net, dataclasses.replace(MIXED, gptq=gptq), budget, **known[not gptq])
    assert (tmp_path / "a").stat().st_size == report.bytes <= budget
    assert report.bytes > 0.99 * budget


def test_more_bytes_lose_less_than_one_width_for_all(net, known, tmp_path):
    losses = []
    for bits in (4, 6):
        uniform = QuantizationConfig(bits=bits, keep_float_numel=1500, clip_quantile=0.99, float16_names=[])
        report = save(tmp_path / "uniform", net, uniform, 10**7)
        save(tmp_path / "mixed", net, MIXED, report.bytes, **known[1])
        losses.append((divergence(net, tmp_path / "mixed"), divergence(net, tmp_path / "uniform")))
        assert losses[-1][0] < 0.6 * losses[-1][1]
    assert all(after[0] < before[0] for before, after in itertools.pairwise(losses))


def test_gptq_loses_less_in_the_same_bytes(net, known, tmp_path):
    for name, gptq in (("rounded", False), ("gptq", True)):
        save(tmp_path / name, net, dataclasses.replace(MIXED, gptq=gptq), 60_000, **known[not gptq])
    assert divergence(net, tmp_path / "gptq") < 0.9 * divergence(net, tmp_path / "rounded")


def test_the_loss_is_the_one_predicted(net, known, tmp_path, caplog):
    caplog.set_level("INFO")
    save(tmp_path / "a", net, MIXED, 60_000, **known[1])
    predicted = float(caplog.text.partition("mixed precision: ")[2].split()[0])
    assert predicted == pytest.approx(divergence(net, tmp_path / "a"), rel=0.4)


def test_with_bytes_enough_nothing_is_lost(net, known, tmp_path):
    save(tmp_path / "a", net, MIXED, 10**7, **known[1])
    stored = load_artifact(tmp_path / "a").state_dict
    assert all(torch.equal(stored[name], tensor) for name, tensor in net.state_dict().items())


def test_with_too_few_bytes_it_is_as_small_as_can_be_and_refused(net, known, tmp_path, caplog):
    report = save(tmp_path / "a", net, MIXED, 3_000, **known[1])
    assert "exported at its smallest" in caplog.text
    assert report.bytes < 18_000
    with pytest.raises(ArtifactTooLargeError):
        check_limit(report.bytes, 0, 3_000, report)


def test_where_gptq_does_not_fit_rounding_to_nearest_may(net, known, tmp_path, caplog):
    assert save(tmp_path / "a", net, dataclasses.replace(MIXED, gptq=True), 18_000, **known[0]).bytes <= 18_000
    assert "exported at its smallest" not in caplog.text


def test_the_same_arguments_give_the_same_bytes(net, ids, tmp_path):
    scheme = dataclasses.replace(MIXED, gptq=True)
    for name in "ab":
        save(tmp_path / name, net, scheme, 50_000, **calibrate(net, scheme, [ids])._asdict())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_few_tokens_of_calibration_cost_no_more_than_none(net, known, tmp_path):
    scheme = dataclasses.replace(MIXED, gptq=True)
    few = calibrate(net, scheme, [torch.arange(12)[None]]).hessians
    save(tmp_path / "gptq", net, scheme, 30_000, **known[1] | {"hessians": few})
    save(tmp_path / "rounded", net, MIXED, 30_000, **known[1])
    assert divergence(net, tmp_path / "gptq") < 1.05 * divergence(net, tmp_path / "rounded")


def test_columns_that_matter_more_have_finer_steps_in_as_many_bits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 32, generator=generator)
    matters = torch.logspace(0, 4, 32, base=2)  # by 16 from the first column to the last
    candidate = Candidate("w", weight, matters.expand_as(weight).clone(), torch.diag(matters), Role.MATRIX)
    assert candidate.columns.tolist() == sorted(candidate.columns.tolist(), reverse=True)
    assert int(candidate.columns[0]) - int(candidate.columns[-1]) == pytest.approx(4 * 2, abs=1)  # two octaves
    rounded = candidate.quantize(0.5, True)
    error = (dequantize_rows(rounded) - weight).square() @ matters
    # The same mean number of levels to a column, with one step for all.
    plain = rounded._replace(columns=None)
    step = rounded.scale.float()[:, None] * 2.0**rounded.exponent
    q = (weight / step).round()
    assert entropy(q) == pytest.approx(entropy(rounded.q), abs=0.1)
    without = (dequantize_rows(plain._replace(q=q)) - weight).square() @ matters
    expected = matters.log().mean().exp() / matters.mean()
    assert float(error.sum() / without.sum()) == pytest.approx(float(expected), rel=0.15)


def entropy(q: torch.Tensor) -> float:
    """Bits, the mean over the columns."""
    shares = [torch.unique(column, return_counts=True)[1].double() / len(column) for column in q.T]
    return float(sum(-(share * share.log2()).sum() for share in shares) / len(shares))


def test_the_number_of_threads_changes_no_byte(net, known, tmp_path):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            save(tmp_path / str(count), net, dataclasses.replace(MIXED, gptq=True), 50_000, **known[0])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_what_showed_no_curvature_is_not_free_to_throw_away():
    # The loss may still have a slope there, which no curvature shows: a whole tensor counts LEAST / 2 nats.
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    options = Candidate("w", weight, torch.zeros_like(weight), None, Role.MATRIX).options()
    assert options[-1].storage == "int"
    assert options[-1].loss == pytest.approx(LEAST / 2, rel=0.05)
    fine = next(option for option in options if option.storage == "int")
    assert fine.loss < 1e-3 * options[-1].loss


def test_shared_weights_are_stored_once_and_small_ones_as_floats(net, known, tmp_path):
    save(tmp_path / "a", net, dataclasses.replace(MIXED, gptq=True), 50_000, **known[0])
    storage = {tensor.name: tensor.storage for tensor in inspect_artifact(tmp_path / "a")[1].tensors}
    assert storage["blocks.1.attn.kv_proj.weight"] == "alias of blocks.0.attn.kv_proj.weight"
    assert len({kind for kind in storage.values() if kind.startswith("int")}) > 1
    assert all(
        storage[name].startswith(("float", "alias"))
        for name, tensor in net.state_dict().items()
        if tensor.numel() <= 1024
    )


@pytest.mark.parametrize("given", [{"bits": 4}, {"float16_names": []}, {"fit_limit": False}, {"coarsen": 2.0}])
def test_settings_that_it_decides_by_itself_are_refused(given):
    with pytest.raises(ValueError, match=f"the scheme 'mixed' decides {next(iter(given))} by itself: leave that out"):
        QuantizationConfig(scheme="mixed", **given)
    named = {"name_bits": {"tok_emb": 8}, "clip_quantile": 0.99, "coarsen": 1.5}
    assert QuantizationConfig(scheme="mixed", **named).coarsen == 1.5


def test_a_named_width_is_kept(net, known, tmp_path):
    scheme = dataclasses.replace(MIXED, name_bits={"blocks.3.mlp.fc": 8})
    report = save(tmp_path / "a", net, scheme, 50_000, **known[1])
    assert report.bytes <= 50_000
    error = (
        load_artifact(tmp_path / "a").state_dict["blocks.3.mlp.fc.weight"] - net.state_dict()["blocks.3.mlp.fc.weight"]
    )
    assert float(error.abs().max()) < 0.01  # left to itself this layer, which hardly matters, gets far fewer levels
    save(tmp_path / "b", net, MIXED, 50_000, **known[1])
    free = load_artifact(tmp_path / "b").state_dict["blocks.3.mlp.fc.weight"]
    assert float((free - net.state_dict()["blocks.3.mlp.fc.weight"]).abs().max()) > 0.05


def test_without_calibration_relative_errors_count_and_the_limit_holds(net, tmp_path):
    report = save(tmp_path / "a", net, MIXED, 50_000)
    assert 0.99 * 50_000 < report.bytes <= 50_000
    stored, weights = load_artifact(tmp_path / "a").state_dict, net.state_dict()
    table, matrix = (stored[name] - weights[name] for name in ("tok_emb.weight", "blocks.1.mlp.fc.weight"))
    assert float(table.square().mean()) < 0.1 * float(matrix.square().mean())


def test_random_tokens_tell_where_bits_belong_almost_as_well(net, known, tmp_path):
    save(tmp_path / "data", net, MIXED, 50_000, **known[1])
    save(tmp_path / "none", net, MIXED, 50_000, **calibrate(net, MIXED, [])._asdict())
    save(tmp_path / "plain", net, MIXED, 50_000)
    data, none, plain = (divergence(net, tmp_path / name) for name in ("data", "none", "plain"))
    assert none < 1.5 * data < plain


def test_steps_of_rows_follow_their_sensitivity():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 400, generator=generator)
    sensitivity_R = torch.tensor([1.0, 1.0, 4.0, 4.0, 16.0, 16.0, 64.0, 64.0])
    candidate = Candidate("w", weight, sensitivity_R[:, None].expand(8, 400), None, Role.MATRIX)
    option = next(
        option
        for option in candidate.options()
        if option.storage == "int" and float(candidate.steps(option.factor).min()) > 2 * float(candidate.finest_R.max())
    )
    error_RC = dequantize_rows(candidate.quantize(option.factor, False)) - weight
    cost_R = error_RC.square().mean(1) * (sensitivity_R + 0.1 * sensitivity_R.mean())
    assert float(cost_R.max() / cost_R.min()) < 1.5  # every row's weights cost the same
    assert option.loss == pytest.approx(0.5 * float((error_RC.square() * sensitivity_R[:, None]).sum()), rel=0.05)


def test_what_gptq_saves_is_known_beforehand(net, known):
    for name in ("blocks.0.mlp.fc.weight", "blocks.1.attn.x_proj.weight", "blocks.2.mlp.proj.weight"):
        hessian = known[0]["hessians"][name]
        weight = net.state_dict()[name]
        candidate = Candidate(name, weight, torch.ones_like(weight), hessian, Role.MATRIX)
        factor = 2 * float((candidate.finest_R / candidate.step_R).max())
        errors = [dequantize_rows(candidate.quantize(factor, gptq)) - as_rows(weight) for gptq in (True, False)]
        gptq, nearest = (float(torch.einsum("rc,cd,rd->", error, hessian, error)) for error in errors)
        assert candidate.gptq_gain == pytest.approx(gptq / nearest, rel=0.25), name


@pytest.mark.parametrize("wrong", [{}, {"tok_emb.weight": torch.ones(3)}])
def test_sensitivities_that_do_not_fit_are_named(net, tmp_path, wrong):
    with pytest.raises(ValueError, match=r"has no finite sensitivities of its shape"):
        save(tmp_path / "a", net, MIXED, 50_000, sensitivities=wrong)


def test_sensitivities_go_with_the_scheme_that_uses_them(net, known, tmp_path):
    with pytest.raises(ValueError, match="takes no sensitivities"):
        save(tmp_path / "a", net, QuantizationConfig(), 50_000, **known[1])
