"""A byte-level tokenizer.json: any text survives and its bytes are counted exactly, and what would not is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from test_token_bytes import SAMPLE, texts

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.generation.text import TextStream


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A vocabulary of 300 with two special tokens and one that is text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens(["width!!"])
    tokenizer.enable_truncation(5)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.model"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def encoder(file):
    return TextEncoder(load_tokenizer(file))


@given(texts)
@settings(max_examples=300, deadline=None)
@example("<s> is text here, and so is <|endoftext|>")
@example("  width!!  widthwidth!!")
@example("日本" * 50)
def test_any_text_survives_and_its_bytes_are_counted_exactly(encoder: TextEncoder, text: str) -> None:
    ids = encoder.encode(text).tolist()
    assert encoder.processor.decode(ids) == text
    assert encoder.audit(text).exact
    stream = TextStream(encoder.processor, at_start=True)
    assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_documents_begin_with_bos_and_controls_count_nothing(encoder, file):
    processor = encoder.processor
    assert encoder.encode_pieces(encoder.cut("ab"))[0] == processor.bos_id() == 1
    assert (processor.eos_id(), processor.get_piece_size()) == (0, 301)
    table = TokenBytes.from_model(file)
    assert table.count(np.array([5, 5]), np.array([0, 1])).tolist() == [0, 0]
    assert table.count(np.array([5]), np.array([300])).tolist() == [len("width!!")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer NFC changes texts"),
        ({"pre_tokenizer": None}, "not byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "add_prefix_space"),
        ({"added_tokens": []}, "no special token that begins a document"),
    ],
)
def test_what_would_not_count_every_byte_is_refused(file, tmp_path, change, message):
    content = json.loads(file.read_text()) | change
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"t\.json cannot be used: .*{message}"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix stands in pieces"),
        (lambda content: content["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix stands"),
        (lambda content: content["model"]["vocab"].update({"zz": 7}), "two of its pieces have one id"),
        (lambda content: content["model"]["vocab"].update({"zz": (1 << 32) - 1}), "has an id over 1,048,576"),
        (lambda content: content["model"]["vocab"].update({"zz": 1 << 16}), "65,537 pieces; the shards"),
        (lambda content: content["model"]["vocab"].update({"x" * (1 << 15): 400}), "a piece of over 32,767 bytes"),
        (lambda content: content["model"]["vocab"].update({"▁the": 400}), "its piece ▁the stands for no bytes"),
        (
            lambda content: content.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "WhitespaceSplit"}, content["pre_tokenizer"]],
                }
            ),
            "its pre-tokenizer WhitespaceSplit may take characters",
        ),
    ],
)
def test_pieces_that_are_no_bytes_of_the_text_are_refused(file, tmp_path, change, message):
    content = json.loads(file.read_text())
    change(content)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"t\.json (cannot be used|is no tokenizer\.json|has).*{message}"):
        load_tokenizer(tmp_path / "t.json")


def test_a_byte_without_piece_and_a_damaged_file_are_refused(file, tmp_path):
    content = json.loads(file.read_text())
    del content["model"]["vocab"]["!"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no piece for the byte 0x21|is no tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json")


def test_without_the_package_its_install_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    Path(tmp_path / "t.json").write_text("{}")
    with pytest.raises(ImportError, match=r"pip install 'hymba-lightning\[tokenizers\]'"):
        load_tokenizer(tmp_path / "t.json")


def test_prepared_text_is_read_back_with_it(file, tmp_path):
    text = "\n".join(SAMPLE * 4).replace("\r", "") + " <s> 日本 "
    (tmp_path / "a.txt").write_text(text)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), tokenizer=str(file), workers=1, val_fraction=0.3)
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=8)
    data.setup("fit")
    assert (data.vocab_size, data.bos_id) == (301, 1)
    both = [data.train_spans.stream, data.val_stream()]
    assert "".join(data.processor.decode(stream[:].tolist()) for stream in both) == text
    counted = [data.token_bytes.count(stream[:-1].numpy(), stream[1:].numpy()).sum() for stream in both]
    assert sum(map(int, counted)) == len(text.encode())
