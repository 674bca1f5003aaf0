"""A byte-level tokenizer.json: its special tokens, and what is refused. Exactness: test_byte_tokenizers."""

import json

import numpy as np
import pytest
from byte_tokenizers import write_tokenizer_json
from test_token_bytes import SAMPLE

from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.model"
    write_tokenizer_json(path, SAMPLE)
    return path


def test_special_tokens_keep_their_ids_and_added_text_its_bytes(file):
    processor = load_tokenizer(file)
    assert (processor.bos_id(), processor.eos_id(), processor.get_piece_size()) == (1, 0, 301)
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
