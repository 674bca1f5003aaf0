"""A released Hymba model in `transformers`: model and tokenizer of its own folder, texts as ours."""

import importlib

import pytest
import torch
from released import write_released_model

from hymba_lightning import SamplingConfig, generate
from hymba_lightning.interop.official import from_hf

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_released_model(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def loaded(folder):
    return hf.load(folder)


def ours(folder, rows, n=20):
    config = SamplingConfig(max_new_tokens=n, temperature=0.0)
    return [list(row) for row in zip(*generate(from_hf(folder), rows, config), strict=True)]


def test_three_lines_from_the_folder_to_text(folder, loaded):
    model, tokenizer = loaded
    prompt = tokenizer("w5 w60 w7 w8 w44", return_tensors="pt")
    out = model.generate(**prompt, **GREEDY, eos_token_id=None)[0].tolist()
    assert out == [5, 60, 7, 8, 44, *ours(folder, [[5, 60, 7, 8, 44]])[0]]
    assert tokenizer.decode(out).startswith("w5 w60 w7 w8 w44 ")
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.vocab_size) == (2, 0, 96)
    assert model.generation_config.eos_token_id == [1, 2]


def test_rows_of_a_padded_batch_and_beams_get_what_they_get_alone(folder, loaded):
    model, _ = loaded
    rows = [[5, 60, 7], list(range(10, 35)), [9]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(ids, attention_mask=mask, **GREEDY, eos_token_id=None)
    assert out[:, longest:].tolist() == ours(folder, rows)
    beams = [
        model.generate(torch.tensor([rows[1]]), num_beams=3, use_cache=cache, **GREEDY)[0].tolist()
        for cache in (True, False)
    ]
    assert beams[0] == beams[1]


def test_it_saves_as_ours_and_comes_back(loaded, tmp_path):
    model, _ = loaded
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 60, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_class_reads_the_folder_too(folder, loaded):
    ids = torch.tensor([[5, 60, 7]])
    with torch.no_grad():
        assert torch.equal(hf.HymbaForCausalLM.from_pretrained(folder)(ids).logits, loaded[0](ids).logits)


def test_labels_train_it(loaded):
    model, _ = loaded
    ids = torch.tensor([[5, 60, 7, 9, 11]])
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    model.eval()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
