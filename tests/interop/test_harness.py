"""lm_eval's requests are answered with the network's own numbers, and its tasks run on local data."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import NET, TOKENIZER, lively

from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.model import HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact

lm_eval = pytest.importorskip("lm_eval")
from hymba_lightning.interop.harness import HymbaLM  # noqa: E402 - needs lm_eval

SENTENCES = ["the end of it", "a text", "more of the same, and then some more of it", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    net = lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()
    path = tmp_path_factory.mktemp("harness") / "artifact.hymba"
    config = net.config.to_dict()
    save_artifact(path, net.state_dict(), config=config, tokenizer={}, metadata={}, scheme=QuantizationConfig())
    assert load_artifact(path).config == config
    return HymbaLM(str(path), tokenizer=str(TOKENIZER), device="cpu", batch_size=3, batch_tokens=64)


@pytest.fixture(scope="module")
def processor():
    return load_tokenizer(TOKENIZER)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def log_p(net, ids):
    with torch.no_grad():
        logits = net(torch.tensor([ids]))[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logits.argmax(-1)


def test_loglikelihoods_are_those_of_each_pair_alone(model, processor):
    pairs = [
        (text, rest) for text in ("", "the end", "the end ", "more of the same, and then") for rest in (" of it", "x y")
    ]
    for (context, continuation), (got, _) in zip(pairs, model.loglikelihood(requests(*pairs)), strict=True):
        ids = [1, *processor.encode(context + continuation)]
        first = 1 + len(processor.encode(context.rstrip())) if context else 1
        assert got == pytest.approx(float(log_p(model.net, ids)[0][first - 1 :].sum()), abs=1e-4)


def test_nothing_is_certain_whatever_stands_before_it(model):
    empty = [("", ""), ("the end", ""), ("", "\n")]
    assert model.loglikelihood(requests(*empty)) == [(0.0, True)] * 3
    alone = model.loglikelihood(requests(("the end", " of it")))
    assert model.loglikelihood(requests(*empty, ("the end", " of it"))) == [(0.0, True)] * 3 + alone


def test_greedy_continuations_are_known_as_such(model, processor):
    prompt = [1, *processor.encode("the end")]
    drawn = [row[0] for row in generate(model.net, [prompt], SamplingConfig(max_new_tokens=3, temperature=0.0))]
    text = processor.decode(prompt + drawn).removeprefix("the end")
    if processor.encode("the end" + text) == prompt[1:] + drawn:
        assert model.loglikelihood(requests(("the end", text)))[0][1]
    assert not model.loglikelihood(requests(("the end", " of quite another")))[0][1]


def test_rolling_loglikelihoods_count_every_token_once(model, processor):
    texts = [*SENTENCES, "of the " * 60]
    for text, got in zip(texts, model.loglikelihood_rolling(requests(*((text,) for text in texts))), strict=True):
        assert got == pytest.approx(float(log_p(model.net, [1, *processor.encode(text)])[0].sum()), abs=2e-3)


def test_generation_stops_where_it_is_told(model):
    settings = {"until": [], "max_gen_toks": 6, "temperature": 0.0}
    free = model.generate_until(requests(*((text, settings) for text in SENTENCES)))
    assert free == [model.generate_until(requests((text, settings)))[0] for text in SENTENCES]
    stop = free[0][2:4]
    (cut,) = model.generate_until(requests((SENTENCES[0], settings | {"until": [stop]})))
    assert cut == free[0].partition(stop)[0]
    shorter = model.generate_until(requests((SENTENCES[0], settings | {"max_gen_toks": 2})))[0]
    assert free[0].startswith(shorter)
    assert len(shorter) < len(free[0])


def test_how_many_tokens_are_wanted_has_several_names_and_may_be_none(model):
    settings = {"until": None, "temperature": 0.0, "num_beams": 1}
    two = [
        model.generate_until(requests((SENTENCES[0], settings | {name: 2})))
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
    ]
    assert two[0] == two[1] == two[2] != [""]
    assert (
        model.generate_until(requests((SENTENCES[0], settings | {"max_gen_toks": 0}), (SENTENCES[0], settings)))[0]
        == ""
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation settings num_beams are not offered: choose from until, max_gen_toks"),
        ({"max_length": 20}, "max_length are not offered"),
        ({"until": [5]}, r"until=\[5\] must be texts"),
        ({"max_gen_toks": -1}, "must be at least 1"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate_until(requests(("the end", settings)))


def test_options_of_lm_evals_command_line_are_heard(model, tmp_path):
    folder = model.net.save_pretrained(tmp_path, tokenizer=TOKENIZER)
    given = {"device": "cpu", "batch_size": "auto:4", "max_batch_size": 8}
    made = HymbaLM.create_from_arg_string(f"weights={folder},dtype=bfloat16", given)
    assert (made.net.runtime.compute_dtype, made.batch_size) == ("bfloat16", 16)
    for size in (0, "-1", 2.5):
        with pytest.raises(ValueError, match=f"batch_size={size} is no number of requests"):
            HymbaLM(str(folder), device="cpu", batch_size=size)
    with pytest.raises(TypeError, match="dtyp"):
        HymbaLM.create_from_arg_string(f"weights={folder},dtyp=bfloat16", given)


@pytest.mark.slow
def test_tasks_on_local_data_run_and_their_bits_per_byte_are_ours(model, tmp_path):
    """A task of each kind, described here, on a file made here: nothing is downloaded."""
    rows = [{"text": text, "question": text, "choices": [" of it", " x"], "label": 0} for text in SENTENCES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
    perplexity = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    answer = {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "text"}
    tasks = [
        {"task": "tiny_choice", **choice, "doc_to_target": "label", "metric_list": [{"metric": "acc"}], **data},
        {"task": "tiny_perplexity", **perplexity, "metric_list": [{"metric": "bits_per_byte"}], **data},
        {"task": "tiny_answer", **answer, "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}, **data}
        | {"metric_list": [{"metric": "bypass"}]},
    ]
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)["results"]
    assert 0 <= results["tiny_choice"]["acc,none"] <= 1
    nats = -sum(model.loglikelihood_rolling(requests(*((text,) for text in SENTENCES))))
    ours = nats / math.log(2) / sum(len(text.encode()) for text in SENTENCES)
    assert results["tiny_perplexity"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-6)
    assert "tiny_answer" in results
