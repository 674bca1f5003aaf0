"""Bits per byte of documents: each by itself, whole, over the bytes that its text has."""

import json
import math

import pytest
import torch
from tiny import NET, TOKENIZER, lively

from hymba_lightning.commands import run_command
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.evaluation.documents import score_texts, token_nats
from hymba_lightning.model import HymbaConfig
from hymba_lightning.quantization import QuantizationConfig, save_artifact

TEXTS = ["the end", "", "a", "of the " * 40, "another text of some length", "the end"]


@pytest.fixture(scope="module")
def net():
    return lively(HymbaConfig(**NET, tied_embed_std=0.3)).eval()


@pytest.fixture(scope="module")
def processor():
    return load_tokenizer(TOKENIZER)


@pytest.mark.parametrize("batch_tokens", [1, 8, 60, 4096])
def test_each_document_has_the_nats_that_it_has_alone(net, batch_tokens):
    documents = [torch.randint(3, 1024, (n,)).tolist() for n in (2, 50, 9, 9, 30)]
    for document, nats in zip(documents, token_nats(net, documents, batch_tokens), strict=True):
        with torch.no_grad():
            alone = net(torch.tensor([document[:-1]]), torch.tensor([document[1:]]), reduction="none")[0]
        assert nats == pytest.approx(alone.double().numpy(), abs=2e-5)


def test_scores_are_over_the_texts_own_bytes(net, processor):
    scored = list(score_texts(net, processor, list(zip("abcdef", TEXTS, strict=True)), batch_tokens=64))
    assert [document.name for document in scored] == ["a", "c", "d", "e", "f"]
    # The same text beside another one: sums of float32 in another order.
    assert scored[0].score.nats == pytest.approx(scored[-1].score.nats, rel=1e-6)
    for document, text in zip(scored, [text for text in TEXTS if text], strict=True):
        assert document.score.n_bytes == len(text)
        assert document.score.n_tokens == len(processor.encode(text))
        assert document.score.bpb == pytest.approx(document.score.nats / math.log(2) / len(text))


def test_bytes_are_of_utf_8(tmp_path):
    (tmp_path / "t.model").write_bytes(train_tokenizer(["some words of text, more words\n"] * 200, 280))
    processor = load_tokenizer(tmp_path / "t.model")
    net = lively(HymbaConfig(**(NET | {"vocab_size": 280})))
    with pytest.raises(ValueError, match="batch_tokens is 0; it must be at least 1"):
        list(score_texts(net, processor, [("x", "y")], batch_tokens=0))
    (scored,) = score_texts(net, processor, [("x", "Grüße 世界 🙂")])
    assert scored.score.n_bytes == len("Grüße 世界 🙂".encode())


@pytest.fixture
def artifact(net, tmp_path):
    path = tmp_path / "artifact.hymba"
    config = net.config.to_dict()
    save_artifact(path, net.state_dict(), config=config, tokenizer={}, metadata={}, scheme=QuantizationConfig())
    return str(path)


def test_the_command_scores_files_and_lines(artifact, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "the end"}\n{"text": "of the"}\n')
    (tmp_path / "texts" / "a.txt").write_text("the end")
    options = ["--tokenizer", str(TOKENIZER), "--device", "cpu"]
    run_command("bpb", [artifact, str(tmp_path / "texts"), "--json", *options])
    *documents, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert [document["document"] for document in documents] == ["a.txt:1", "b.jsonl:1", "b.jsonl:2"]
    assert documents[0]["bits_per_byte"] == documents[1]["bits_per_byte"]
    assert total["documents"] == 3
    assert total["bytes"] == 20
    nats = sum(document["nats"] for document in documents)
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / 20)
    run_command("bpb", [artifact, "--device", "cpu", str(tmp_path / "texts"), "--tokenizer", str(TOKENIZER)])
    plain = capsys.readouterr().out
    assert f"{total['bits_per_byte']:8.4f}          20 bytes  all 3 documents" in plain


@pytest.mark.parametrize("texts", [["\n"], ["\n", "\n\n"]])
def test_texts_of_which_a_tokenizer_makes_nothing_are_none(artifact, tmp_path, texts):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--tokenizer", str(TOKENIZER), "--device", "cpu"]
    with pytest.raises(ValueError, match="the tokenizer makes no token of what the inputs hold"):
        run_command("bpb", [artifact, str(tmp_path / "lines.jsonl"), *options])


def test_what_cannot_be_scored_is_an_error(artifact, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "the end"}\n{"txt": 1}\n')
    options = ["--tokenizer", str(TOKENIZER), "--device", "cpu"]
    with pytest.raises(ValueError, match="no document to score"):
        run_command("bpb", [artifact, str(tmp_path / "empty.txt"), *options])
    with pytest.raises(ValueError, match=r"broken\.jsonl:2.*; leave it out, or mend it$"):
        run_command("bpb", [artifact, str(tmp_path / "broken.jsonl"), *options])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_command("bpb", [artifact, str(tmp_path / "nowhere"), *options])
