"""A parameter says what it is where it is made, and whoever asks the network later is told."""

import copy

import pytest
import torch
from torch import nn

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.model.roles import Module, Role, RoleError, declare, parameter, roles_of

CONFIG = HymbaConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, bigram_buckets=32, bigram_dim=8)
PROJ = ("attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight", "bigram_hash.proj.weight")
# What the artifacts and checkpoints of earlier versions were made by.
KNOWN = {
    Role.EMBEDDING: ["tok_emb.weight"],
    Role.TABLE: ["bigram_hash.table.weight"],
    Role.MATRIX: ["c_q.weight", "kv_proj.weight", "mamba_proj.weight", "x_proj.weight", "mamba_out_proj.weight", *PROJ],
    Role.CONVOLUTION: ["conv1d.weight"],
    Role.DYNAMICS: ["A_log", "dt_proj.bias"],
    Role.DYNAMICS_MATRIX: ["dt_proj.weight"],
    Role.CONTROL: [
        "attn_scale",
        "mlp_scale",
        "resid_mix",
        "q_gain",
        "attn.D",
        "skip_weights",
        "smeargate.gate",
        "alpha",
    ],
    Role.SCALAR: ["conv1d.bias"],
}


def test_every_parameter_has_the_role_that_its_name_once_stood_for():
    roles = roles_of(Hymba(CONFIG))
    assert set(roles) == set(Hymba(CONFIG).state_dict())
    for name, role in roles.items():
        assert name.endswith(tuple(KNOWN[role])), (name, role)


def test_roles_outlive_copies_moves_and_loading():
    net = Hymba(CONFIG)
    roles = roles_of(net)
    with torch.device("meta"):
        empty = Hymba(CONFIG)
    for other in (copy.deepcopy(net), net.to(torch.bfloat16), torch.nn.Module.to_empty(empty, device="cpu")):
        assert roles_of(other) == roles
    net.load_state_dict(Hymba(CONFIG).state_dict(), assign=True)
    assert roles_of(net) == roles


def test_a_parameter_without_a_role_is_refused_where_it_is_made():
    class Careless(Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2))

    with pytest.raises(RoleError, match=r"Careless\.gain has no role: make it with parameter\(tensor, Role"):
        Careless()


def test_a_module_of_others_is_refused_until_its_parameters_are_declared():
    net = Module()
    net.norm, net.gain = nn.LayerNorm(3), parameter(torch.ones(1), Role.CONTROL)
    with pytest.raises(RoleError, match=r"norm\.weight has no role"):
        roles_of(net)
    declare(net.norm, weight=Role.SCALAR, bias=Role.SCALAR)
    assert roles_of(net) == {"gain": Role.CONTROL, "norm.weight": Role.SCALAR, "norm.bias": Role.SCALAR}


def test_a_shared_parameter_has_its_role_under_each_name():
    net = Hymba(HymbaConfig(**(CONFIG.to_dict() | {"kv_share_every": 2})))
    assert roles_of(net)["blocks.1.attn.kv_proj.weight"] is Role.MATRIX
    assert set(roles_of(net)) == set(net.state_dict())
