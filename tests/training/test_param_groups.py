"""Every parameter in exactly one group, by role."""

import pytest
import torch
from torch import nn

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import RoleError
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
    net = Hymba(config)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {name: {names[id(p)] for p in members} for name, members in assign_parameters(net, rules).items()}


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
    net.blocks[0].attn.novel = nn.LayerNorm(3)
    with pytest.raises(RoleError, match=r"blocks\.0\.attn\.novel\.weight has no role"):
        build_optimizer(net, OptimizerConfig())
    rules = build_rules(tied=False, train_conv=True, dynamics_in_muon=False)
    with pytest.raises(ParameterGroupError, match="'head' is empty: the network has no head parameter"):
        assign_parameters(Hymba(HymbaConfig(**SMALL)), rules)
    rules = [rule for rule in rules if rule.name not in ("conv", "head")]
    with pytest.raises(ParameterGroupError, match=r"claims blocks\.0\.attn\.conv1d\.weight, a parameter for convol"):
        assign_parameters(Hymba(HymbaConfig(**SMALL)), rules)


def test_a_network_without_convolutions_has_no_group_of_them():
    net = Hymba(HymbaConfig(**SMALL))
    for block in net.blocks:
        del block.attn.conv1d
    assert "conv" not in {group["name"] for group in build_optimizer(net, OptimizerConfig()).param_groups}


def test_a_compiled_network_has_the_same_groups():
    compiled = torch.compile(Hymba(HymbaConfig(**SMALL)))
    assert len(build_optimizer(compiled, OptimizerConfig()).param_groups) == 5


def test_learning_rates_and_decay_per_group():
    net = Hymba(HymbaConfig(**SMALL, tie_embeddings=False))
    optimizer = build_optimizer(net, OptimizerConfig(weight_decay=0.15))
    found = {g["name"]: (g["algorithm"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "embed": ("adam", 0.6, 0.0),
        "head": ("adam", 0.008, 0.0),
        "conv": ("adam", 0.02, 0.0),
        "dynamics": ("adam", 0.002, 0.0),
        "matrices": ("muon", 0.02, 0.15),
        "scalars": ("adam", 0.02, 0.0),
    }
    tied = build_optimizer(Hymba(HymbaConfig(**SMALL)), OptimizerConfig())
    assert tied.param_groups[0]["lr"] == 0.02
