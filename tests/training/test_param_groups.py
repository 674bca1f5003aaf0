"""Every parameter in exactly one group, by name."""

import pytest
import torch
from torch import nn

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer
from hymba_lightning.training.param_groups import ParameterGroupError, assign_parameters, build_rules

SMALL = {
    "vocab_size": 64,
    "n_layers": 4,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "bigram_buckets": 32,
    "bigram_dim": 16,
    "window": 8,
}
OPTIONS = {"meta_tokens": 2, "kv_share_every": 2, "merge": "channel", "branch_norm": True, "expand": 2}
SIDE_BY_SIDE = {"merge": "concat", "branch_gate": 5, "value_gate": True, "dynamics_norm": True}


def groups_of(config: HymbaConfig, **switches: bool) -> dict[str, set[str]]:
    options = {"train_conv": True, "dynamics_in_muon": False} | switches
    rules = build_rules(tied=config.tie_embeddings, **options)
    members = assign_parameters(Hymba(config).named_parameters(), rules)
    return {name: {n for n, _ in pairs} for name, pairs in members.items()}


@pytest.mark.parametrize("extra", [{}, OPTIONS, {**OPTIONS, "tie_embeddings": False}, SIDE_BY_SIDE])
def test_the_groups_cover_the_network(extra):
    config = HymbaConfig(**SMALL, **extra)
    groups = groups_of(config)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in Hymba(config).named_parameters())
    assert groups["embed"] == {"tok_emb.weight"}
    assert ("head" in groups) == (not config.tie_embeddings)
    for i in range(4):
        assert {f"blocks.{i}.attn.A_log", f"blocks.{i}.attn.dt_proj.weight"} <= groups["dynamics"]
        assert f"blocks.{i}.attn.dt_proj.bias" in groups["dynamics"]
        assert f"blocks.{i}.attn.conv1d.weight" in groups["conv"]
        assert {f"blocks.{i}.attn.conv1d.bias", f"blocks.{i}.attn.D", f"blocks.{i}.resid_mix"} <= groups["scalars"]
        assert {f"blocks.{i}.attn.proj.weight", f"blocks.{i}.mlp.proj.weight"} <= groups["matrices"]
        assert (f"blocks.{i}.attn.branch_gate" in groups["scalars"]) == bool(config.branch_gate)
    assert "bigram_hash.proj.weight" in groups["matrices"]
    assert {"bigram_hash.table.weight", "smeargate.gate", "skip_weights"} <= groups["scalars"]


def test_reference_switches_reproduce_its_defects():
    groups = groups_of(HymbaConfig(**SMALL), train_conv=False, dynamics_in_muon=True)
    assert "conv" not in groups
    assert "dynamics" not in groups
    assert "blocks.0.attn.conv1d.weight" in groups["untrained"]
    assert {"blocks.0.attn.conv1d.bias", "blocks.0.attn.dt_proj.bias"} <= groups["scalars"]
    assert {"blocks.0.attn.A_log", "blocks.0.attn.dt_proj.weight"} <= groups["matrices"]


def test_an_unclaimed_parameter_and_an_empty_group_are_errors_with_names():
    net = Hymba(HymbaConfig(**SMALL))
    net.blocks[0].attn.novel = nn.Parameter(torch.zeros(3))
    with pytest.raises(ParameterGroupError, match=r"blocks\.0\.attn\.novel \(3,\)"):
        build_optimizer(net.named_parameters(), OptimizerConfig(), tied=True)
    renamed = [(n.replace("conv1d.weight", "D"), p) for n, p in Hymba(HymbaConfig(**SMALL)).named_parameters()]
    with pytest.raises(ParameterGroupError, match=r"'conv' is empty.*conv1d\.weight"):
        build_optimizer(renamed, OptimizerConfig(), tied=True)
    with pytest.raises(ParameterGroupError, match="'head' is empty"):
        build_optimizer(Hymba(HymbaConfig(**SMALL)).named_parameters(), OptimizerConfig(), tied=False)


def test_prefixes_of_wrappers_do_not_matter():
    named = [(f"net._orig_mod.{n}", p) for n, p in Hymba(HymbaConfig(**SMALL)).named_parameters()]
    assert len(build_optimizer(named, OptimizerConfig(), tied=True).param_groups) == 5


def test_learning_rates_and_decay_per_group():
    net = Hymba(HymbaConfig(**SMALL, tie_embeddings=False))
    optimizer = build_optimizer(net.named_parameters(), OptimizerConfig(weight_decay=0.15), tied=False)
    found = {g["name"]: (g["algorithm"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "embed": ("adam", 0.6, 0.0),
        "head": ("adam", 0.008, 0.0),
        "conv": ("adam", 0.02, 0.0),
        "dynamics": ("adam", 0.002, 0.0),
        "matrices": ("muon", 0.02, 0.15),
        "scalars": ("adam", 0.02, 0.0),
    }
    tied = build_optimizer(Hymba(HymbaConfig(**SMALL)).named_parameters(), OptimizerConfig(), tied=True)
    assert tied.param_groups[0]["lr"] == 0.02
