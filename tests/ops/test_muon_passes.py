"""Muon's passes in Triton's interpreter against torch's operators, over several updates; choice and refusals."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_within, collect, differences, needs_triton, run_cases

from hymba_lightning.muon import Muon
from hymba_lightning.ops.muon_passes import Update, passes, plan_banks
from hymba_lightning.ops.registry import BackendUnavailableError, choose

# Wide, tall and square ones, of several banks; odd sizes; less than a block and more than one; a row, a column.
SHAPES = [(16, 48), (48, 16), (16, 48), (40, 40), (5, 131), (67, 45), (1, 33), (33, 1), (70, 150), (150, 70), (7, 7)]
# name: the rule's options, weight decay.
RULES = {
    "plain momentum": ({"nesterov": False}, 0.1),
    "Nesterov": ({}, 0.1),
    "rows of length 1": ({"row_normalize": True}, 0.1),
    "Polar Express": ({"row_normalize": True, "coefficients": "polar_express"}, 0.1),
    "cautious decay": ({"row_normalize": True, "cautious": True}, 0.3),
    "cautious, no decay": ({"cautious": True}, 0.0),
    # Float16, because the interpreter cuts bfloat16 off where a GPU rounds it.
    "half precision": ({"row_normalize": True, "dtype": torch.float16}, 0.1),
}
STEPS = 3
# A digit that falls the other way grows in the steps of Newton-Schulz.
LIMIT = {"half precision": 1e-2}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def trained(backend, options, weight_decay, buffer=False):
    """The parameters' way and the momenta of several updates, rates and momentum changing; `buffer`: gradients are
    views of one buffer, so that some do not begin at 16 bytes."""
    muon = Muon(**{"dtype": torch.float32, **options}, backend=backend)
    params = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    momenta = [torch.zeros(shape) for shape in SHAPES]
    start = [p.clone() for p in params]
    flat = torch.empty(sum(p.numel() for p in params) + 1)
    for step in range(STEPS):
        # Rows of different lengths, and one of zeros.
        grads = [random(*s, seed=31 * step + i) * torch.logspace(-1, 1, s[0])[:, None] for i, s in enumerate(SHAPES)]
        grads[3][5] = 0
        if buffer:
            views = flat[1:].split([g.numel() for g in grads])
            grads = [view.view_as(g).copy_(g) for view, g in zip(views, grads, strict=True)]
        muon.step(params, grads, momenta, lr=0.02 / (step + 1), momentum=0.85 + 0.02 * step, weight_decay=weight_decay)
    ways = {f"way {i}": p - p0 for i, (p, p0) in enumerate(zip(params, start, strict=True))}
    return ways | {f"momentum {i}": m for i, m in enumerate(momenta)}


def compare(name, buffer=False):
    """A case: the ratios, and whether the momenta are equal."""
    found, expected = (trained(backend, *RULES[name], buffer) for backend in ("triton", "torch"))
    momenta = all(torch.equal(found[key], x) for key, x in expected.items() if key.startswith("momentum"))
    return {"ratios": differences(found, expected), "momenta": momenta}


def rounded():
    """A case: the share of a float16 bank's numbers that differ from torch's, and by how many of their digits."""
    update = Update(
        [random(*shape) for shape in SHAPES],
        [random(*shape, seed=1) for shape in SHAPES],
        [random(*shape, seed=2) for shape in SHAPES],
        lr=0.1,
        momentum=0.0,
        weight_decay=0.1,
        row_normalize=True,
    )
    banks, _ = plan_banks([p.shape for p in update.params], 1)
    differing = numbers = digits = 0
    both = [passes(update, banks, backend=backend) for backend in ("triton", "torch")]
    for of_update in both:
        of_update.momentum()
    for bank in banks:
        found, expected = (of_update.bank(bank, 0, len(bank.members), torch.float16) for of_update in both)
        steps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        differing, numbers = differing + steps.count_nonzero().item(), numbers + steps.numel()
        digits = max(digits, steps.max().item())
    return {"share": differing / numbers, "digits": digits}


def shares():
    """A case: what three ranks' passes make of one bank, put together as a gather does, against one rank's."""
    shapes = [(12, 20)] * 2 + [(20, 12)] * 3
    params, grads = ([random(*s, seed=seed + i) for i, s in enumerate(shapes)] for seed in (0, 5))
    found = {}
    for backend in ("triton", "torch"):
        moved = [p.clone() for p in params]
        update = Update(moved, grads, [torch.zeros_like(p) for p in params], 0.1, 0.9, 0.1, row_normalize=True)
        (bank,), size = plan_banks([p.shape for p in params], 3)
        of_update = passes(update, [bank], backend=backend)
        of_update.momentum()
        flat_WS = torch.zeros(3, size + 7)
        for rank in range(3):
            x_nRC = of_update.bank(bank, 2 * rank, min(2 * rank + 2, 5), torch.float32)
            flat_WS[rank, : x_nRC.numel()] = x_nRC.flatten()
        of_update.apply(bank, flat_WS[:, :size])
        found[backend] = {str(i): p for i, p in enumerate(moved)}
    return {"ratios": differences(found["triton"], found["torch"])}


def versions():
    """A case: how often parameters and momenta count as written to after one update."""
    p, m = torch.ones(4, 4), torch.zeros(4, 4)
    before = p._version, m._version
    Muon(backend="triton").step([p], [torch.ones(4, 4)], [m], lr=0.1, momentum=0.9, weight_decay=0.0)
    return {"written": [p._version > before[0], m._version > before[1]]}


@pytest.fixture(scope="module")
def results():
    return collect(__file__)


@needs_triton
@pytest.mark.parametrize("name", RULES)
def test_updates_go_the_way_of_torchs_operators(results, name):
    assert_within(results[name], LIMIT.get(name, 2e-5))


@needs_triton
@pytest.mark.parametrize("name", RULES)
def test_momenta_are_torchs_to_the_bit(results, name):
    assert results[name].get("momenta"), results[name]


@needs_triton
def test_a_bank_is_rounded_as_torch_rounds_it_but_for_a_last_digit_here_and_there(results):
    assert "error" not in results["rounded"], results["rounded"]["error"]
    assert results["rounded"]["share"] < 1e-3
    assert results["rounded"]["digits"] <= 1


@needs_triton
def test_gradients_may_begin_anywhere(results):
    assert_within(results["views of one buffer"], 2e-5)


@needs_triton
def test_ranks_shares_of_a_bank_are_found_again(results):
    assert_within(results["shares"], 1e-6)


@needs_triton
def test_what_is_made_of_weights_hears_of_an_update(results):
    assert results["versions"].get("written") == [True, True], results["versions"]


def test_choice_and_refusals(monkeypatch):
    monkeypatch.setattr("hymba_lightning.ops.registry.is_installed", lambda package: True)
    assert choose("muon_passes", "auto", "cpu", plain=True, neurons=False) == "torch"
    assert choose("muon_passes", "auto", "cuda", plain=True, neurons=False) == "triton"
    for refused in ({"plain": False, "neurons": False}, {"plain": True, "neurons": True}):
        assert choose("muon_passes", "auto", "cuda", **refused) == "torch"
    with pytest.raises(BackendUnavailableError, match="contiguous float32 parameters"):
        choose("muon_passes", "triton", "cuda", plain=False, neurons=False)
    with pytest.raises(BackendUnavailableError, match="muon_neuron_beta to 0"):
        choose("muon_passes", "triton", "cuda", plain=True, neurons=True)


if __name__ == "__main__":
    run_cases(
        {name: lambda name=name: compare(name) for name in RULES}
        | {"views of one buffer": lambda: compare("Nesterov", buffer=True)}
        | {"rounded": rounded, "shares": shares, "versions": versions}
    )
