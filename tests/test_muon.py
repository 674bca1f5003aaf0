"""Muon against the reference's vectors, torch's own Muon and the singular value decomposition; sharding over ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_lightning import run_ranks

from hymba_lightning import muon
from hymba_lightning.muon import POLAR_EXPRESS, Muon, iteration_coefficients, orthogonalize, plan_banks
from hymba_lightning.ops.testing import rms_ratio

GOLDEN = Path(__file__).parent / "golden" / "muon.npz"
SHAPES = [(16, 32), (32, 16), (24, 24), (16, 32), (16, 32), (24, 24), (8, 40)]


def rms(x):
    return x.float().pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reference_vectors(dtype):
    vectors = np.load(GOLDEN, allow_pickle=False)
    muon = Muon(dtype=dtype)
    momenta = [torch.zeros(vectors[f"p0_{i}"].shape) for i in range(3)]
    for t in range(6):
        before = [torch.tensor(vectors[f"p{t}_{i}"]) for i in range(3)]
        params = [p.clone() for p in before]
        grads = [torch.tensor(vectors[f"g{t}_{i}"]) for i in range(3)]
        f = min(t / 4, 1.0)
        muon.step(params, grads, momenta, lr=0.02 * (1 - t / 10), momentum=(1 - f) * 0.85 + f * 0.95, weight_decay=0.02)
        for i in range(3):
            expected = torch.tensor(vectors[f"p{t + 1}_{i}"])
            assert rms(params[i] - expected) < 2e-2 * rms(expected)
            # The update by itself agrees up to what bf16 leaves of it after five steps.
            change, expected_change = params[i] - before[i], expected - before[i]
            assert rms(change - expected_change) < 6e-2 * rms(expected_change)


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-5), (False, 5e-2)])
def test_torch_muon_at_constant_momentum(exact, tolerance, monkeypatch):
    # torch keeps an average (lerp) instead of a sum: the same direction when momentum is constant. Its iteration is in
    # bfloat16 even where the matrices are not; in float32 nothing is left between the two.
    if exact:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    ours = [torch.randn(s) for s in SHAPES]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    muon, momenta = Muon(dtype=torch.float32), [torch.zeros(s) for s in SHAPES]
    start = [p.clone() for p in ours]
    for _ in range(20):
        grads = [torch.randn(s) for s in SHAPES]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        reference.step()
        muon.step(ours, grads, momenta, lr=0.02, momentum=0.95, weight_decay=0.1)
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        assert rms(p - q.detach()) < tolerance * rms(p - p0)


@pytest.mark.parametrize(("name", "low", "high"), [("quintic", 0.6, 1.3), ("polar_express", 0.87, 1.13)])
def test_orthogonalize_brings_singular_values_to_one(name, low, high):
    torch.manual_seed(0)
    bank = torch.randn(3, 24, 64)
    result = orthogonalize(bank, iteration_coefficients(name, 5), torch.float32)
    for g, x in zip(bank, result, strict=True):
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        values = torch.linalg.diagonal(u.T @ x @ v.T)
        assert values.min() > low
        assert values.max() < high
        # The singular vectors stay: nothing off the diagonal.
        assert (u.T @ x @ v.T - values.diag()).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 20, 40), (2, 7, 90)])
def test_wide_matrices_take_the_same_steps_by_their_gram_matrix(name, shape, monkeypatch):
    """Also with singular values that span four orders of magnitude, against the iteration in float64."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    bank = (left * torch.logspace(0, -4, shape[1])) @ right
    coefficients = iteration_coefficients(name, 5)
    expected = orthogonalize(bank, coefficients, torch.float64)
    calls = []
    monkeypatch.setattr(muon, "newton_schulz_step", lambda *step: calls.append(step))
    found = orthogonalize(bank, coefficients, torch.float32)
    monkeypatch.undo()
    assert not calls
    # What a GPU does in bfloat16 is off by 13 to 30 %.
    assert 50 * rms_ratio(found, expected) < rms_ratio(orthogonalize(bank, coefficients, torch.bfloat16), expected)


def test_polar_express_steps_spread_their_error_evenly():
    # A minimax odd quintic on [l, u] reaches its largest error at both ends, with alternating sign in between; the
    # next step's interval is what this one leaves. The first three steps are fitted to a cushioned lower bound, so
    # that their inner extremes are not all equal.
    low, high = 1e-3, 1.0
    for step, (a, b, c) in enumerate(POLAR_EXPRESS[:6]):
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        turns = torch.nonzero((error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0).flatten() + 1
        extremes = torch.cat([error[:1], error[turns], error[-1:]])
        assert extremes.sign().tolist() == [-1, 1, -1, 1]
        even = extremes if step >= 3 else extremes[[0, 1, 3]]
        assert even.abs().max() - even.abs().min() < 1e-6
        low, high = 1 + error.min().item(), 1 + error.max().item()


def test_row_normalize_makes_row_lengths_irrelevant():
    torch.manual_seed(0)
    grads = [torch.randn(s) for s in SHAPES]
    scaled = [g * torch.logspace(-2, 2, g.shape[0])[:, None] for g in grads]
    for row_normalize, same in ((True, True), (False, False)):
        results = []
        for given in (grads, scaled):
            params = [torch.zeros(s) for s in SHAPES]
            Muon(row_normalize=row_normalize).step(
                params, given, [torch.zeros(s) for s in SHAPES], lr=1.0, momentum=0.9, weight_decay=0.0
            )
            results.append(params)
        for p, q in zip(*results, strict=True):
            assert (rms(p - q) < 3e-2 * rms(p)) == same


def test_plain_momentum_orthogonalizes_the_buffer():
    torch.manual_seed(0)
    m0, g = torch.randn(8, 8), torch.randn(8, 8)
    for nesterov in (False, True):
        p, m = torch.zeros(8, 8), m0.clone()
        Muon(nesterov=nesterov).step([p], [g], [m], lr=1.0, momentum=0.5, weight_decay=0.0)
        assert torch.allclose(m, 0.5 * m0 + g)
        direction = g + 0.5 * m if nesterov else m
        expected = orthogonalize(direction[None], iteration_coefficients("quintic", 5), torch.float32)[0]
        assert torch.equal(p, -expected)


def test_unknown_coefficients_and_shapes_are_errors():
    with pytest.raises(ValueError, match="'cubic' is unknown; use 'quintic' or 'polar_express'"):
        Muon(coefficients="cubic")
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4\)"):
        plan_banks([torch.Size((3, 1, 4))], 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_banks_give_every_matrix_one_owner(world_size):
    banks, flat_size = plan_banks([torch.Size(s) for s in SHAPES], world_size)
    slots = [(p // b.share, b.offset + p % b.share * b.numel, b.numel) for b in banks for p in range(len(b.members))]
    assert sorted(i for b in banks for i in b.members) == list(range(len(SHAPES)))
    assert len(set(slots)) == len(SHAPES)
    assert all(owner < world_size and start + size <= flat_size for owner, start, size in slots)


def _train_sharded(rank: int, world_size: int, folder: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    params, momenta = [torch.randn(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    for dtype in (torch.float32, torch.bfloat16):
        muon = Muon(shard=world_size > 1, dtype=dtype)
        for _ in range(2):
            muon.step(params, [torch.randn(s) for s in SHAPES], momenta, lr=0.02, momentum=0.9, weight_decay=0.02)
    torch.save([params, momenta], f"{folder}/{world_size}_{rank}.pt")


@pytest.mark.ddp
def test_sharding_changes_nothing(tmp_path):
    _train_sharded(0, 1, str(tmp_path))
    for world_size in (2, 3):
        run_ranks(_train_sharded, world_size, str(tmp_path), world_size=world_size)
    alone = torch.load(tmp_path / "1_0.pt")
    for world_size in (2, 3):
        for rank in range(world_size):
            shared = torch.load(tmp_path / f"{world_size}_{rank}.pt")
            first = torch.load(tmp_path / f"{world_size}_0.pt")
            for kind in (0, 1):
                for a, b, c in zip(alone[kind], shared[kind], first[kind], strict=True):
                    assert torch.equal(b, c)  # replicas never drift
                    # Another batch size may round differently in bf16.
                    assert rms(a - b) < 3e-3 * rms(a)


def test_rows_of_unequal_updates_even_out_and_the_matrix_keeps_its_norm():
    torch.manual_seed(0)
    direction = torch.randn(6, 4) * torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0, 0.25])[:, None]
    plain, even = [torch.zeros(6, 4)], [torch.zeros(6, 4)]
    moments = [torch.zeros(6, 1)]
    rule = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    Muon(dtype=torch.float32).step(plain, [direction], [torch.zeros(6, 4)], **rule)
    muon = Muon(dtype=torch.float32, neuron_beta=0.9)
    muon.step(even, [direction], [torch.zeros(6, 4)], **rule, neurons=moments)
    lengths = even[0].norm(dim=1)
    assert lengths.max() / lengths.min() < 1.001 < plain[0].norm(dim=1).max() / plain[0].norm(dim=1).min()
    torch.testing.assert_close(even[0].norm(), plain[0].norm())
    torch.testing.assert_close(moments[0], 0.1 * (plain[0] / (6 / 4) ** 0.5).square().mean(1, keepdim=True))
    # A second, equal step: the moment is an average, not a sum.
    muon.step(even, [direction], [torch.zeros(6, 4)], **rule, neurons=moments)
    torch.testing.assert_close(moments[0], 0.19 * (plain[0] / (6 / 4) ** 0.5).square().mean(1, keepdim=True))


@pytest.mark.parametrize("neuron_beta", [0.0, 0.9])
def test_cautious_decay_takes_only_from_weights_that_the_update_shrinks(neuron_beta):
    torch.manual_seed(0)
    start, grad = torch.randn(5, 7), torch.randn(5, 7)
    steps = []
    for weight_decay in (0.0, 0.5):
        params = [start.clone()]
        Muon(dtype=torch.float32, cautious=True, neuron_beta=neuron_beta).step(
            params,
            [grad],
            [torch.zeros(5, 7)],
            lr=0.01,
            momentum=0.9,
            weight_decay=weight_decay,
            neurons=[torch.zeros(5, 1)],
        )
        steps.append(params[0] - start)
    shrinks = steps[0] * start < 0
    expected = torch.where(shrinks, -0.01 * 0.5 * start, torch.zeros(()))
    assert shrinks.any()
    assert not shrinks.all()
    torch.testing.assert_close(steps[1] - steps[0], expected, atol=1e-6, rtol=1e-5)
