"""Sensitivities against the exact Fisher information, and against what moving the weights really does."""

import dataclasses

import pytest
import torch

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Role
from hymba_lightning.quantization.sensitivity import collect_fisher, plain_sensitivity, random_batches

CONFIG = HymbaConfig(
    vocab_size=12,
    n_layers=2,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    window=8,
    d_state=2,
    bigram_buckets=16,
    bigram_dim=4,
    kv_share_every=2,
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Hymba(CONFIG)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def exact(net: Hymba, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over tokens of Σ_y p(y) (∂ log p(y))², one backward pass for each token and y."""
    parameters = dict(net.named_parameters())
    log_p = net(ids).float().log_softmax(-1)[0]
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for token in range(log_p.shape[0]):
        for y in range(log_p.shape[1]):
            gradients = torch.autograd.grad(
                log_p[token, y], list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += log_p[token, y].exp().detach() * gradient**2
    return {name: total / log_p.shape[0] for name, total in sums.items()}


def test_tables_have_their_columns_products_and_linears_do_not():
    net = Hymba(dataclasses.replace(CONFIG, vocab_size=20))
    fisher = collect_fisher(net, [torch.randint(0, 20, (3, 10), generator=torch.Generator().manual_seed(1))])
    assert {name for name in fisher.columns if "." not in name or "blocks" not in name} == {
        "tok_emb.weight",
        "bigram_hash.table.weight",
    }
    assert not any(name.endswith(("c_q.weight", "fc.weight")) for name in fisher.columns)
    for name, product in fisher.columns.items():
        assert torch.equal(product, product.T)
        torch.testing.assert_close(product.diagonal(), fisher.sensitivities[name].sum(0))
    off = fisher.columns["tok_emb.weight"].fill_diagonal_(0)
    assert float(off.norm()) > 0
    # A sequence is one sample of a row: two rows of 16 would leave directions that look free.
    assert not any(name.endswith("resid_mix") for name in fisher.columns)


def test_many_draws_approach_the_exact_fisher_information(net):
    ids = torch.randint(0, 12, (1, 10), generator=torch.Generator().manual_seed(1))
    measured, expected = collect_fisher(net, [ids.expand(250, -1)]).sensitivities, exact(net, ids)
    for name, tensor in expected.items():
        if tensor.sum() > 0:
            assert float(measured[name].sum()) == pytest.approx(float(tensor.sum()), rel=0.3), name
    total = sum(float(tensor.sum()) for tensor in expected.values())
    assert sum(float(measured[name].sum()) for name in expected) == pytest.approx(total, rel=0.1)
    name = "blocks.0.mlp.fc.weight"  # weight by weight, not only in sum
    assert torch.corrcoef(torch.stack([measured[name].flatten(), expected[name].flatten()]))[0, 1] > 0.9


def test_it_predicts_what_moving_the_weights_does(net):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 12, (64, 16), generator=generator)
    sensitivities = collect_fisher(net, [ids]).sensitivities
    original = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        log_p = net(ids).float().log_softmax(-1)
        for name in (
            "tok_emb.weight",
            "blocks.0.attn.mamba_proj.weight",
            "blocks.0.attn.A_log",
            "blocks.1.mlp.proj.weight",
        ):
            measured = predicted = 0.0
            for _ in range(10):
                move = 0.01 * torch.randn(original[name].shape, generator=generator)
                net.load_state_dict(original | {name: original[name] + move})
                log_q = net(ids).float().log_softmax(-1)
                measured += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
                predicted += 0.5 * float((sensitivities[name] * move**2).sum())
            net.load_state_dict(original)
            assert predicted == pytest.approx(measured, rel=0.5), name


def test_names_of_one_weight_share_its_sensitivity_and_no_gradient_is_touched(net):
    marker = torch.ones_like(net.tok_emb.weight)
    net.tok_emb.weight.grad = marker
    with torch.no_grad():
        sensitivities = collect_fisher(net, [torch.arange(8)[None]]).sensitivities
    assert net.tok_emb.weight.grad is marker
    assert torch.equal(marker, torch.ones_like(marker))
    net.tok_emb.weight.grad = None
    assert set(sensitivities) == set(net.state_dict())
    assert sensitivities["blocks.0.attn.kv_proj.weight"] is sensitivities["blocks.1.attn.kv_proj.weight"]
    assert all(tensor.shape == net.state_dict()[name].shape for name, tensor in sensitivities.items())


def test_the_same_batches_give_the_same(net):
    first, again = (collect_fisher(net, random_batches(CONFIG, 2, 16)).sensitivities for _ in range(2))
    other = collect_fisher(net, random_batches(CONFIG, 2, 16, seed=1)).sensitivities
    name = "blocks.0.mlp.fc.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_random_batches_are_ids_behind_a_bos():
    batches = list(random_batches(CONFIG, 3, 50))
    assert [tuple(batch.shape) for batch in batches] == [(1, 50)] * 3
    assert all(
        int(batch[0, 0]) == CONFIG.bos_id and 0 <= int(batch.min()) <= int(batch.max()) < 12 for batch in batches
    )
    assert len(torch.cat(batches).unique()) == 12


def test_no_batches_are_refused(net):
    with pytest.raises(ValueError, match="no batches"):
        collect_fisher(net, [])


def test_a_plain_sensitivity_is_that_of_the_relative_error():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert float((plain_sensitivity(Role.MATRIX, weight) * weight**2).sum()) == pytest.approx(1.0)
    assert float((plain_sensitivity(Role.EMBEDDING, weight) * weight**2).sum()) == pytest.approx(100.0)
    assert torch.isfinite(plain_sensitivity(Role.MATRIX, torch.zeros(3))).all()
