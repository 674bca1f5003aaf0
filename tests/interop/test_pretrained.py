"""Networks as folders with config.json and model.safetensors, and everything that can be wrong with such a folder."""

import base64
import json
import math
import struct

import pytest
import torch
from tiny import NET, TOKENIZER, lively

from hymba_lightning import Hymba, HymbaConfig
from hymba_lightning.data.tokenizer import file_sha256, train_tokenizer
from hymba_lightning.generation import find_tokenizer, load_network
from hymba_lightning.interop.pretrained import PretrainedError, load_pretrained, read_config
from hymba_lightning.quantization import load_artifact

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("tokenizers")

FULL = HymbaConfig(**NET).to_dict()
VARIANTS = {
    "plain": {},
    "keys and values shared": {"kv_share_every": 2, "n_layers": 4},
    "own head, bfloat16 dynamics": {"tie_embeddings": False, "dynamics_dtype": "bfloat16", "meta_tokens": 2},
}


@pytest.fixture(scope="module")
def net() -> Hymba:
    return lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()


@pytest.fixture
def folder(net, tmp_path):
    return net.save_pretrained(tmp_path / "saved", tokenizer=TOKENIZER)


def same_weights(one: Hymba, other: Hymba) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_weights_come_back_to_the_bit(tmp_path, change):
    net = lively(HymbaConfig(**(NET | change)))
    back = Hymba.from_pretrained(net.save_pretrained(tmp_path))
    assert back.config == net.config
    assert same_weights(net, back)
    assert not back.training
    if change.get("kv_share_every") == 2:
        assert back.blocks[0].attn.kv_proj.weight is back.blocks[1].attn.kv_proj.weight


def test_the_artifact_is_a_second_file_of_weights(net, tmp_path):
    only = net.save_pretrained(tmp_path / "only", weights="artifact", tokenizer=TOKENIZER)
    assert not (only / "model.safetensors").exists()
    rounded = load_artifact(only / "artifact.hymba").state_dict
    for name, value in Hymba.from_pretrained(only).state_dict().items():
        assert torch.equal(value, rounded[name].view_as(value)), name
    both = net.save_pretrained(tmp_path / "both", weights="both", artifact=only / "artifact.hymba")
    assert same_weights(Hymba.from_pretrained(both), net)
    assert same_weights(Hymba.from_pretrained(both, weights="artifact"), Hymba.from_pretrained(only))
    # Weights of another save would be another network's.
    net.save_pretrained(both)
    assert not (both / "artifact.hymba").exists()


def test_the_folder_is_a_place_to_load_from_everywhere(folder, net):
    loaded, fingerprint = load_network(folder)
    assert same_weights(loaded, net)
    assert fingerprint == file_sha256(TOKENIZER)
    assert find_tokenizer(folder, None, fingerprint) == folder / "tokenizer.model"
    assert find_tokenizer(folder / "model.safetensors", None, fingerprint) == folder / "tokenizer.model"


def test_config_json_says_what_other_libraries_look_for(folder):
    config = read_config(folder)
    assert config["architectures"] == ["HymbaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [1, 2]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(net, tmp_path):
    (tmp_path / "other.model").write_bytes(train_tokenizer(["some words of text, more words\n"] * 200, 280))
    other = lively(HymbaConfig(**(NET | {"window": 8})))
    artifact = other.save_pretrained(tmp_path / "other", weights="artifact") / "artifact.hymba"
    for options, message in [
        ({"weights": "gguf"}, "choose from safetensors, artifact, both"),
        ({"tokenizer": tmp_path / "other.model"}, "280 pieces, and the network's vocab_size is 1024"),
        ({"weights": "both", "artifact": artifact}, "another network's artifact"),
    ]:
        with pytest.raises(ValueError, match=message):
            net.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_folders_place_is_named(net, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="cannot be made, a file stands in its place: give another folder"):
        net.save_pretrained(tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ValueError, match="the folder's name is empty"):
        net.save_pretrained("")


def test_a_network_that_could_not_be_loaded_again_is_not_saved(tmp_path):
    net = Hymba(HymbaConfig(**NET)).eval()
    net.blocks[1].attn.proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight holds values that are not finite"):
        net.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_flipped_bit_of_the_weights_is_noticed(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match=r"model\.safetensors is damaged: its weights do not match their digest"):
        Hymba.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 7, 200, -100])
def test_a_cut_file_is_named(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PretrainedError, match=r"model\.safetensors is damaged"):
        Hymba.from_pretrained(folder)


def test_integers_for_weights_are_refused(folder):
    header = json.dumps({"net.skip_weights": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(PretrainedError, match=r"skip_weights is no weight of a network \(torch\.int64\)"):
        Hymba.from_pretrained(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder, net, value):
    weights = net.state_dict() | {"skip_weights": torch.full_like(net.state_dict()["skip_weights"], value)}
    safetensors.save_file(
        {f"net.{name}": tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    with pytest.raises(PretrainedError, match="its tensor skip_weights holds values that are not finite"):
        Hymba.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": FULL | {"d_model": 64}}, r"does not fit config\.json: its config has a token table of \[1024, 64\]"),
        ({"net": FULL | {"d_state": 8}}, r"does not fit config\.json: its tensor .* has the shape"),
        ({"net": FULL | {"windows": 3}}, "fields this version does not know: windows"),
        ({"net": FULL | {"merge": 5}}, "merge='5' is int, where str is needed. Fetch or save it again"),
        ({"net": {name: FULL[name] for name in FULL if name != "window"}}, "does not say the network's window. Fetch"),
        ({"net": None}, "no network's config under 'net'"),
        ({"model_type": "llama"}, r"another kind of model \('llama' where 'hymba_lightning' is needed\)"),
        ({"pad_token_id": 1024}, "pad_token_id=1024 is no id below the network's vocab_size=1024"),
        ({"eos_token_id": [2, "x"]}, r"eos_token_id=\[2, 'x'\] is no id below"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PretrainedError, match=message):
        Hymba.from_pretrained(folder)


def test_a_config_that_is_no_object_is_named(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(PretrainedError, match=r"config\.json holds no JSON object. Fetch or save it again"):
        Hymba.from_pretrained(folder)


def rewritten(folder, change):
    """The safetensors file with some tensors changed and no digest."""
    path = folder / "model.safetensors"
    safetensors.save_file(change(safetensors.load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: {n: v.to(torch.float8_e4m3fn) for n, v in all_.items()}, "is no weight of a network .*float8"),
        (lambda all_: all_ | {"net.skip_weights": torch.tensor(1.0)}, r"skip_weights has the shape \[\]"),
        (
            lambda all_: all_ | {"skip_weights": all_["net.skip_weights"] * 0},
            "two tensors for one weight, skip_weights",
        ),
        (lambda all_: {n: v for n, v in all_.items() if "tok_emb" not in n}, "and its tensors none. Fetch both again"),
    ],
    ids=["float8", "a scalar", "two names", "missing"],
)
def test_tensors_that_are_not_the_networks_are_named(folder, change, message):
    rewritten(folder, change)
    with pytest.raises(PretrainedError, match=message):
        Hymba.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "artifact.hymba"])
def test_what_git_leaves_in_the_place_of_a_large_file_is_named(net, tmp_path, name):
    folder = net.save_pretrained(tmp_path, weights="both")
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(PretrainedError, match="Git LFS's pointer to a file, not the file: `git lfs pull` fetches it"):
        Hymba.from_pretrained(folder, weights="safetensors" if name.startswith("model") else "artifact")


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_half_fetched_weights_are_not_silently_replaced_by_the_artifacts(net, tmp_path, kind):
    path = net.save_pretrained(tmp_path, weights="both") / "model.safetensors"
    path.unlink()
    path.symlink_to(tmp_path / "blob") if kind == "link" else path.mkdir()
    with pytest.raises(PretrainedError, match=r"model\.safetensors is no file, or a link to none. Fetch"):
        Hymba.from_pretrained(tmp_path)
    assert Hymba.from_pretrained(tmp_path, weights="artifact").config == net.config


def test_weights_in_several_files_are_read_by_their_index(folder, net):
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = {name: f"model-{index % 2 + 1:05}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(names.values()):
        safetensors.save_file({name: tensors[name] for name in names if names[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert same_weights(Hymba.from_pretrained(folder), net)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
        Hymba.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"net.skip_weights": "../elsewhere.safetensors"}}))
    with pytest.raises(PretrainedError, match="no weight_map of tensors to files beside it"):
        Hymba.from_pretrained(folder)


def test_a_runs_folder_is_told_how_it_becomes_one_of_ours(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"the folder is a run's, and `hymba publish .* --out FOLDER` makes one"
    ):
        Hymba.from_pretrained(tmp_path)


def test_missing_things_are_named_with_the_remedy(folder, tmp_path):
    with pytest.raises(ValueError, match="choose safetensors or artifact"):
        load_pretrained(folder, weights="pickle")
    with pytest.raises(FileNotFoundError, match=r"holds no artifact\.hymba"):
        load_pretrained(folder, weights="artifact")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no artifact\.hymba"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="a folder that save_pretrained wrote"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nor the name owner/name"):
        load_pretrained(tmp_path / "nowhere")


def test_another_librarys_tokenizer_is_refused_before_anything_is_written(net, tmp_path):
    pieces = [base64.b64encode(bytes([byte])) for byte in range(256)]
    (tmp_path / "t").write_bytes(b"".join(b"%s %d\n" % (piece, rank) for rank, piece in enumerate(pieces)))
    pytest.importorskip("tiktoken")
    with pytest.raises(
        ValueError, match=r"neither a SentencePiece model nor a tokenizer\.json, .*: publish .* --tokenizer none"
    ):
        net.save_pretrained(tmp_path / "saved", tokenizer=tmp_path / "t")
    assert not (tmp_path / "saved").exists()
