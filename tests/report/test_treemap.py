"""The map of an artifact: which part of the network a tensor belongs to, asked of the network."""

import pytest

from hymba_lightning.model import HymbaConfig
from hymba_lightning.report.treemap import parts_of


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_every_tensor_is_in_the_part_that_it_works_in(mixer):
    parts = parts_of(HymbaConfig(n_layers=2, d_model=32, mixer=mixer, branch_gate=3, meta_tokens=1).to_dict())
    for part, names in {
        "embedding": ["tok_emb.weight", "bigram_hash.proj.weight", "smeargate.gate"],
        "attention": ["blocks.0.attn.c_q.weight", "blocks.1.attn.kv_proj.weight", "blocks.0.attn.q_gain"],
        "recurrent": ["blocks.0.attn.A_log", "blocks.0.attn.D", "blocks.1.attn.conv1d.bias"]
        + [f"blocks.1.attn.{name}.weight" for name in ("mamba_proj", "mamba_out_proj", "dt_proj")],
        "mlp": ["blocks.0.mlp.fc.weight"],
        "other": ["skip_weights", "blocks.0.attn_scale"],
    }.items():
        assert {name: parts[name] for name in names} == dict.fromkeys(names, part)


def test_so_it_is_in_the_released_models_network():
    config = HymbaConfig(n_layers=2, d_model=32, mixer="official", smear_gate=False, bigram_hash=False, meta_tokens=1)
    parts = parts_of(config.to_dict())
    for part, names in {
        "embedding": ["tok_emb.weight"],
        "attention": [f"blocks.0.attn.{name}.weight" for name in ("in_proj", "out_proj", "attention_norm")],
        "recurrent": [f"blocks.1.attn.{name}" for name in ("A_log", "dt_norm.weight", "conv1d.bias")],
        "mlp": ["blocks.0.mlp.gate.weight"],
        "other": ["norm.weight", "blocks.0.mlp_norm.weight"],
    }.items():
        assert {name: parts[name] for name in names} == dict.fromkeys(names, part)
