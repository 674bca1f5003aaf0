"""AutoModel gives what the head reads; heads that a Hymba has not are refused in a sentence."""

import importlib

import official_statement as statement
import pytest
import torch
from official_statement import SMALL
from tiny import NET

from hymba_lightning.interop import official
from hymba_lightning.ops.testing import rms_ratio

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

IDS = torch.randint(3, 1024, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(saved):
    return [auto.from_pretrained(saved) for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM)]


def logits_of(model, hidden):
    cap = model.net.config.logit_softcap
    return cap * torch.tanh(hidden @ model.net.tok_emb.weight.T / cap)


@torch.no_grad()
def test_vectors_are_what_the_head_reads_of_padded_rows_too(pair):
    model, with_head = pair
    assert type(model) is hf.HymbaModel
    assert not model.can_generate()
    for padding in (None, (torch.arange(20) > 4).long().expand(2, -1), (torch.arange(20) < 15).long().expand(2, -1)):
        hidden = model(IDS, attention_mask=padding).last_hidden_state
        assert hidden.shape == (2, 20, 32)
        assert rms_ratio(logits_of(model, hidden), with_head(IDS, attention_mask=padding).logits) < 1e-5


@torch.no_grad()
def test_vectors_go_on_after_a_cache(pair):
    model = pair[0]
    first = model(IDS[:, :12], use_cache=True)
    rest = [model(IDS[:, t : t + 1], past_key_values=first.cache)[0] for t in range(12, 20)]
    assert rms_ratio(torch.cat([first[0], *rest], dim=1), model(IDS)[0]) < 1e-5
    assert first.cache.columns == 20


def test_a_head_of_ones_own_trains_on_vectors(saved):
    model = transformers.AutoModel.from_pretrained(saved, weights="artifact")
    head = torch.nn.Linear(model.config.hidden_size, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(head(model(IDS).last_hidden_state[:, -1]), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_features_come_by_a_pipeline_and_what_is_saved_has_its_head_again(saved, pair, tmp_path):
    features = transformers.pipeline("feature-extraction", str(saved))("the end", return_tensors=True)
    ids = transformers.AutoTokenizer.from_pretrained(saved)("the end", return_tensors="pt")
    with torch.no_grad():
        assert rms_ratio(features, pair[0](**ids)[0]) < 1e-6
        pair[0].save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, pair[1](IDS).logits)


@torch.no_grad()
def test_a_released_networks_vectors_have_its_norm(tmp_path):
    config = official.config_from_hf(SMALL)
    net = hf.HymbaForCausalLM(hf.HymbaPretrainedConfig(net=config.to_dict())).net
    net.load_state_dict(official.weights_from_hf(config, statement.random_weights(SMALL)))
    ids = IDS % config.vocab_size
    model = transformers.AutoModel.from_pretrained(net.save_pretrained(tmp_path))
    assert rms_ratio(torch.nn.functional.linear(model(ids)[0], net.tok_emb.weight), net(ids)) < 1e-5


def test_other_input_is_named_as_ever(pair):
    with pytest.raises(ValueError, match="output_hidden_states is not offered"):
        pair[0](IDS, output_hidden_states=True)
    with pytest.raises(ValueError, match="input_ids must be a tensor of token ids"):
        pair[0](IDS.float())


@pytest.mark.parametrize(
    "task",
    [
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MultipleChoice",
        "NextSentencePrediction",
        "MaskedLM",
        "Seq2SeqLM",
    ],
)
def test_heads_that_are_not_there_are_refused_with_what_is(saved, task):
    auto = getattr(transformers, f"AutoModelFor{task}")
    wanted = rf"AutoModelFor{task} asks for a head that no Hymba has: take AutoModel, whose last_hidden_state"
    with pytest.raises(ValueError, match=wanted):
        auto.from_pretrained(saved)
    with pytest.raises(ValueError, match=wanted):
        auto.from_config(hf.HymbaPretrainedConfig(net=NET))
