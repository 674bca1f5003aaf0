"""Files of the released Hymba models: their config.json and names become ours and go back; what is wrong is named."""

import json

import official_statement as statement
import pytest
import torch
from official_statement import SMALL

from hymba_lightning import Hymba, RuntimeConfig
from hymba_lightning.generation import load_network
from hymba_lightning.interop import official
from hymba_lightning.interop.pretrained import PretrainedError
from hymba_lightning.model.costs import matmul_params
from hymba_lightning.model.hymba import outline

safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.randint(1, 96, (1, 30), generator=torch.Generator().manual_seed(5))


def write(folder, config=None, weights=None):
    config = SMALL | (config or {})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = statement.random_weights(config) if weights is None else weights
    safetensors.save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("official"))


def test_a_folder_of_theirs_is_loaded_from_everywhere(folder):
    wanted = statement.logits(SMALL, statement.random_weights(SMALL), IDS[0].tolist())
    for net in (official.from_hf(folder), Hymba.from_pretrained(folder), load_network(folder)[0]):
        assert not net.training
        with torch.no_grad():
            assert torch.allclose(net(IDS)[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": False, "kv_reuse_group": None}, {"sliding_window": None, "rope_type": "default"}],
    ids=str,
)
def test_weights_go_in_and_out_to_the_bit(tmp_path, change):
    config = SMALL | change
    if change.get("sliding_window", 1) is None:
        config |= {"kv_reuse_group": None, "global_attn_idx": None, "num_memory_tokens": 0}
    net = official.from_hf(write(tmp_path / "in", config))
    out = official.to_hf(net, tmp_path / "out")
    written = safetensors.load_file(out / "model.safetensors")
    given = statement.random_weights(config)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)
    again = official.from_hf(out)
    assert again.config == net.config
    # Through a folder of ours too.
    assert Hymba.from_pretrained(net.save_pretrained(tmp_path / "ours")).config == net.config


def test_weights_in_several_files_and_in_bfloat16(tmp_path):
    weights = {name: value.bfloat16() for name, value in statement.random_weights(SMALL).items()}
    folder = write(tmp_path / "parts")
    (folder / "model.safetensors").unlink()
    names, files = sorted(weights), {}
    for part in range(3):
        mine = names[part::3]
        safetensors.save_file({name: weights[name] for name in mine}, folder / f"model-{part}.safetensors")
        files |= dict.fromkeys(mine, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole = official.from_hf(folder)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    half = official.from_hf(folder, RuntimeConfig(compute_dtype="bfloat16"), matrices="bfloat16")
    assert half.blocks[1].attn.in_proj.weight.dtype == half.tok_emb.weight.dtype == torch.bfloat16
    assert half.blocks[1].attn.A_log.dtype == half.blocks[1].attn.dt_norm.weight.dtype == torch.float32
    for name, value in half.state_dict().items():
        assert torch.equal(value.float(), whole.state_dict()[name]), name
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-1\.safetensors, which .*index\.json names: fetch it"):
        official.from_hf(folder)
    for weight_map in ({"x": "../x.safetensors"}, {"x": {}, "y": []}, {"x": 3}, [], "x"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(PretrainedError, match="no weight_map of tensors to files beside it"):
            official.from_hf(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        official.from_hf(folder)


def test_rows_that_the_tokenizer_has_no_pieces_for_can_be_left_out(folder):
    whole, cut = official.from_hf(folder), official.from_hf(folder, vocab_size=90)
    with torch.no_grad():
        ids = IDS % 90
        assert torch.allclose(cut(ids), whole(ids)[..., :90], rtol=0, atol=1e-5)
    for wrong in (97, 1):
        with pytest.raises(ValueError, match=f"vocab_size={wrong} is not between bos_id and the 96 rows"):
            official.from_hf(folder, vocab_size=wrong)


def test_a_head_that_is_written_twice_is_taken_once(tmp_path):
    weights = statement.random_weights(SMALL)
    folder = write(tmp_path / "a", weights=weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert official.from_hf(folder).lm_head is None
    write(folder, weights=weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(PretrainedError, match=r"lm_head\.weight is not .* set tie_word_embeddings to false"):
        official.from_hf(folder)


LAYER = "model.layers.2.mamba"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{LAYER}.A_log.0": None}, rf"it lacks {LAYER}\.A_log\.0: give the config\.json that belongs"),
        ({f"{LAYER}.k_proj.weight": 3}, rf"it has, beyond the network's, {LAYER}\.k_proj\.weight: give"),
        (
            {f"{LAYER}.in_proj.weight": 3},
            r"in_proj\.weight has the shape \[3\], where config\.json asks for \[240, 48\]",
        ),
        ({"model.memory_tokens": 3}, r"memory_tokens has the shape \[3\], where config\.json asks for \[5, 48\]"),
        (dict.fromkeys([f"more.{i}" for i in range(9)], 3), r"more\.0, more\.1, more\.2 and 6 more"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, said):
    weights = statement.random_weights(SMALL)
    for name, size in change.items():
        weights.pop(name, None)
        if size:
            weights[name] = torch.zeros(size)
    with pytest.raises(PretrainedError, match=said):
        official.from_hf(write(tmp_path / "a", weights=weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 4}, "asks for num_experts=4, and only what the released Hymba models do is here"),
        ({"mamba_proj_bias": True, "kq_norm": "rms"}, "asks for mamba_proj_bias=True, kq_norm='rms'"),
        ({"rope_type": "dynamic_ntk"}, "rope_type 'dynamic_ntk'"),
        ({"orig_max_position_embeddings": None}, "orig_max_position_embeddings=None is not here"),
        ({"sliding_window": "8"}, "sliding_window is '8', no whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and at most 256 can be read"),
        ({"hidden_size": 49}, "d_model=49 is not a multiple of n_heads=6"),
        ({"vocab_size": "96"}, "vocab_size='96' is str"),
        ({"kv_reuse_group": [[0, 1]]}, "with the same window"),
        ({"kv_reuse_group": "pairs"}, "kv_reuse_group is 'pairs', no list of lists of layers"),
        ({"kv_reuse_group": [["1", "2"]]}, "kv_groups="),
        ({"kv_reuse_group": False}, "kv_reuse_group is 'False', no list of lists of layers"),
        ({"global_attn_idx": 0}, "global_attn_idx is '0', no list of layers"),
        ({"global_attn_idx": {}}, "global_attn_idx is '{}', no list of layers"),
        ({"global_attn_idx": [9]}, r"global_layers names \[9\]"),
        ({"mamba_d_state": None}, "d_state='None' is NoneType"),
        ({"hidden_size": None}, "hidden_size is None, no whole number"),
        ({"num_hidden_layers": "7", "sliding_window": None}, "num_hidden_layers is '7', no whole number"),
        ({"mamba_dt_rank": "much"}, "dt_rank='much' is str"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_one_sentence(tmp_path, change, said):
    with pytest.raises(PretrainedError, match=said) as caught:
        official.from_hf(write(tmp_path / "a", change, {"x": torch.zeros(1)}))
    assert "config.json: " in str(caught.value)


def test_a_field_that_is_missing_is_named(tmp_path):
    folder = write(tmp_path / "a", weights={"x": torch.zeros(1)})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in SMALL.items() if k != "mamba_d_state"}))
    with pytest.raises(PretrainedError, match=r"it has no mamba_d_state, which a released Hymba's config\.json has"):
        Hymba.from_pretrained(folder)


def test_folders_of_another_kind_are_told_apart(tmp_path, folder):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PretrainedError, match=r"is of model_type 'llama', not 'hymba': Hymba\.from_pretrained"):
        official.from_hf(tmp_path)
    with pytest.raises(ValueError, match="matrices='int8' is unknown: choose float32 or bfloat16"):
        official.from_hf(folder, matrices="int8")
    net = Hymba(type(official.preset())(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1))
    with pytest.raises(ValueError, match=r"no place for mixer='mamba' with logit_softcap=30\.0: save_pretrained"):
        official.to_hf(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_preset_has_the_size_that_is_published():
    config = official.preset()
    net = outline(config)
    # "1.5B", in 32 layers of width 1600.
    assert sum(p.numel() for p in net.parameters()) == 1_522_797_824
    assert matmul_params(net) > 1.5e9
    assert config.window_of(1) == 1025
    assert [layer for layer in range(32) if config.window_of(layer) is None] == [0, 15, 31]
    assert (config.head_dim, config.value_dim, config.d_inner) == (64, 128, 3200)
    assert config.resolved_rope_base == pytest.approx(10000 * 7 ** (64 / 62))
    assert sum(owner == layer for layer, owner in enumerate(config.kv_owners)) == 17
