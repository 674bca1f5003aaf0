"""Push and pull by huggingface_hub, against a hub on this machine."""

import importlib

import pytest
import torch
from stand_in_hub import COMMIT, stand_in_hub
from tiny import NET, TOKENIZER, lively

from hymba_lightning import Hymba, HymbaConfig
from hymba_lightning.generation import find_tokenizer, load_network
from hymba_lightning.package.publish import publish

huggingface_hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")
importlib.import_module("hymba_lightning.hf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with stand_in_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield hub


@pytest.fixture(scope="module")
def net() -> Hymba:
    return lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()


def test_what_is_pushed_comes_back(hub, net, tmp_path):
    url = net.push_to_hub("me/tiny", tokenizer=TOKENIZER, weights="both")
    assert url == f"{hub.url}/me/tiny/commit/{COMMIT}"
    assert {"config.json", "model.safetensors", "artifact.hymba", "tokenizer.model"} <= set(hub.repositories["me/tiny"])
    back = Hymba.from_pretrained("me/tiny", cache_dir=tmp_path / "mine")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in net.state_dict().items())
    hub.asked.clear()
    again = Hymba.from_pretrained("me/tiny", cache_dir=tmp_path / "mine", local_files_only=True)
    assert again.config == net.config
    assert hub.asked == []


def test_a_repository_is_a_name_for_every_command(hub, net):
    net.push_to_hub("me/tiny", tokenizer=TOKENIZER)
    loaded, fingerprint = load_network("hf:me/tiny")
    assert loaded.config == net.config
    assert find_tokenizer("hf:me/tiny", None, fingerprint).name == "tokenizer.model"


def test_transformers_takes_it_from_the_hub(hub, net):
    net.push_to_hub("me/tiny", tokenizer=TOKENIZER)
    model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny")
    assert torch.equal(model.net.tok_emb.weight, net.tok_emb.weight)


def test_an_unknown_repository_is_named(hub):
    with pytest.raises(FileNotFoundError, match="me/nothing is no folder, and the hub does not give it"):
        Hymba.from_pretrained("me/nothing")


def test_a_refused_push_says_how_to_log_in(hub, net, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(ConnectionError, match=r"does not take me/tiny \(.*401.*\): log in with `hf auth login`"):
        net.push_to_hub("me/tiny")
    with pytest.raises(ValueError, match="is no name of a repository"):
        net.push_to_hub("me//tiny")


def test_a_run_is_published_with_its_card(hub, fitted_run, tmp_path):
    publish(str(fitted_run), str(tmp_path / "out"), weights="both", push_to="lab/demo")
    card = hub.repositories["lab/demo"]["README.md"].decode()
    parsed = huggingface_hub.ModelCard(card)
    assert parsed.data.pipeline_tag == "text-generation"
    assert {result.metric_type for result in parsed.data.eval_results} == {"bits_per_byte"}
    model = transformers.AutoModelForCausalLM.from_pretrained("lab/demo")
    assert model.config.net == load_network(fitted_run / "artifact.hymba")[0].config.to_dict()
