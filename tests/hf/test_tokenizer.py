"""Tokenizers for transformers give SentencePiece's ids, for every text."""

import importlib

import pytest
import sentencepiece
from byte_tokenizers import write_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER

from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.interop.tokenizer import fast_tokenizer, why_not_fast, write_tokenizer

transformers = pytest.importorskip("transformers")
hf = importlib.import_module("hymba_lightning.hf")

SAMPLE = [
    "def read(path):\n    return path.read_text()  # Grüße, 世界\n",
    "Once upon a time there was a king.\tHe had   three sons; the youngest was naïve…\n",
    "aaaa aaa aa a ababab baba 1234567 111 <s> </s> 🙂🙂 é e\u0301 ﬁ ①\n",
] * 60
ODD = ["\u0301", "é", "▁", "<s>", "</s>", "\x00", "🙂", "世", "ﬁ", "1", "\n", "\t", " ", "  ", "the "]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from([*ODD, "a", "aa", "b", "ab"]), max_size=25).map("".join)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tokenizer as `hymba prepare` trains it."""
    path = tmp_path_factory.mktemp("own") / "tokenizer.model"
    path.write_bytes(train_tokenizer(SAMPLE, 420))
    return path


@pytest.fixture(scope="module")
def sentence_pieces(own):
    return {path: sentencepiece.SentencePieceProcessor(model_file=str(path)) for path in (own, TOKENIZER)}


@pytest.fixture(scope="module")
def loaded(own, tmp_path_factory):
    """Both tokenizers as AutoTokenizer loads them from a folder."""
    found = {}
    for path in (own, TOKENIZER):
        folder = tmp_path_factory.mktemp("folder")
        (folder / "tokenizer.model").write_bytes(path.read_bytes())
        write_tokenizer(path, folder)
        hf.HymbaPretrainedConfig().save_pretrained(folder)
        found[path] = transformers.AutoTokenizer.from_pretrained(folder)
    return found


def test_the_fast_tokenizer_where_it_is_exact_and_sentencepiece_elsewhere(own, loaded):
    assert why_not_fast(own) is None
    assert why_not_fast(TOKENIZER) == "it normalises texts (nmt_nfkc)"
    assert loaded[own].is_fast
    assert type(loaded[TOKENIZER]) is hf.HymbaTokenizer
    with pytest.raises(ValueError, match="cannot be converted exactly: it normalises"):
        fast_tokenizer(TOKENIZER)


def test_unigram_models_stay_with_sentencepiece(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE), model_prefix=str(tmp_path / "u"), vocab_size=60, minloglevel=2
    )
    assert why_not_fast(tmp_path / "u.model") == "it is no byte-pair encoding"


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_ids_are_sentencepieces(loaded, sentence_pieces, text):
    for path, tokenizer in loaded.items():
        processor = sentence_pieces[path]
        ids = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [processor.bos_id(), *ids]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_texts_come_back(loaded, sentence_pieces, text):
    for path, tokenizer in loaded.items():
        ids = tokenizer(text)["input_ids"]
        expected = sentence_pieces[path].decode(ids)
        if sentence_pieces[path].unk_id() not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_a_tokenizer_saved_by_transformers_is_the_same(loaded, tmp_path):
    for number, tokenizer in enumerate(loaded.values()):
        tokenizer.save_pretrained(tmp_path / str(number))
        hf.HymbaPretrainedConfig().save_pretrained(tmp_path / str(number))
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert again("Once upon <s> a ﬁ time")["input_ids"] == tokenizer("Once upon <s> a ﬁ time")["input_ids"]


def test_batches_are_padded_on_the_left(loaded, own):
    batch = loaded[own](["aaaa", "a king"], padding=True)
    assert batch["attention_mask"][0][-1] == 1
    assert {len(row) for row in batch["input_ids"]} == {max(map(sum, batch["attention_mask"]))}
    assert loaded[own].pad_token_id == 0


def test_special_tokens_are_marked_as_what_is_in_front_of_each_text(loaded):
    for tokenizer in loaded.values():
        for texts in (("the end",), ("the end", "of it")):
            encoded = tokenizer(*texts, return_special_tokens_mask=True)
            ids = encoded["input_ids"]
            assert encoded["special_tokens_mask"] == [int(token == tokenizer.bos_token_id) for token in ids]
            assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)[0] == 1


def test_what_is_no_text_and_no_id_is_named(loaded):
    tokenizer = loaded[TOKENIZER]
    with pytest.raises(ValueError, match="not UTF-8 at its character 3; give it as UTF-8"):
        tokenizer("a \ud800")
    for token in (-1, 5000):
        with pytest.raises(ValueError, match=f"{token} is no id of the tokenizer, which has 1024 pieces"):
            tokenizer.decode([token])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json, and a folder for transformers with it."""
    folder = tmp_path_factory.mktemp("byte_level")
    write_tokenizer_json(folder / "tokenizer.model", SAMPLE, vocab_size=400)
    write_tokenizer(folder / "tokenizer.model", folder)
    hf.HymbaPretrainedConfig().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_pair(byte_level):
    """What training encodes with, and what AutoTokenizer and `hf.tokenizer_of` make of it."""
    file = byte_level / "tokenizer.model"
    return load_tokenizer(file), [transformers.AutoTokenizer.from_pretrained(byte_level), hf.tokenizer_of(file)]


@given(TEXTS | st.sampled_from(["width!!", "a<|endoftext|>b", "long " * 20]))
@settings(max_examples=300, deadline=None)
def test_a_tokenizer_json_keeps_its_ids_with_bos_in_front(byte_level_pair, text):
    own, others = byte_level_pair
    for other in others:
        assert other(text)["input_ids"] == [own.bos_id(), *own.encode(text)]
        assert other.decode(own.encode(text)) == text


def test_a_tokenizer_json_names_its_special_tokens(byte_level, byte_level_pair):
    for other in byte_level_pair[1]:
        assert other.is_fast
        assert (other.bos_token, other.eos_token, other.pad_token) == ("<s>", "<|endoftext|>", "<s>")
    assert sorted(path.name for path in byte_level.iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
