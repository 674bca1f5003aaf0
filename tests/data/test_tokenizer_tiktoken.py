"""Files of tiktoken's: which are taken, with which words and BOS, what is refused. Exactness: test_byte_tokenizers."""

import base64
import hashlib
import random

import pytest
from byte_tokenizers import write_tiktoken

from hymba_lightning.data import tokenizer_huggingface, tokenizer_tiktoken
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def file(tmp_path):
    write_tiktoken(tmp_path / "t.tiktoken")
    return tmp_path / "t.tiktoken"


def test_bos_is_the_first_id_after_the_ranks(file):
    pytest.importorskip("tiktoken")
    processor = load_tokenizer(file)
    assert (processor.bos_id(), processor.eos_id(), processor.get_piece_size()) == (264, -1, 265)
    assert [token for token in range(265) if processor.is_control(token)] == [264]
    assert processor.decode([264, 97, 264, 98]) == "ab"


def test_lines_in_any_order_and_of_other_systems_are_the_same_vocabulary(file):
    pytest.importorskip("tiktoken")
    ids = load_tokenizer(file).encode(" width  1 日本")
    lines = file.read_bytes().splitlines()
    random.Random(0).shuffle(lines)
    file.write_bytes(b"\r\n".join(lines))
    assert load_tokenizer(file).encode(" width  1 日本") == ids


def test_empty_lines_are_skipped_as_the_package_does(file):
    pytest.importorskip("tiktoken")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"\n", b"\n\n", 3) + b"\n\n")
    assert load_tokenizer(file).get_piece_size() == 265


def test_text_is_cut_into_words_as_gpt4_does_but_in_gpt2s_own_files(tmp_path, monkeypatch):
    """GPT-4 cuts numbers after three digits; GPT-2 does not, and its file may leave out the id of its BOS."""
    pytest.importorskip("tiktoken")
    path = tmp_path / "t.tiktoken"
    write_tiktoken(path, more=[b"12", b"123", b"1234", b"x"])
    path.write_bytes(path.read_bytes().replace(b" 258\n", b" 260\n").removesuffix(b"eA== 259\n"))
    with pytest.raises(ValueError, match="no piece has the rank 258, though others have higher ones"):
        load_tokenizer(path)
    monkeypatch.setattr(tokenizer_tiktoken, "GPT2_FILES", {hashlib.sha256(path.read_bytes()).hexdigest()})
    gpt2 = load_tokenizer(path)
    assert (gpt2.bos_id(), gpt2.get_piece_size()) == (258, 261)
    assert gpt2.encode("1234") == [260]
    write_tiktoken(path, more=[b"12", b"123", b"1234"])
    assert load_tokenizer(path).encode("1234") == [257, ord("4")]


def test_more_spaces_than_the_package_takes_in_a_row_survive(file):
    pytest.importorskip("tiktoken")
    processor = load_tokenizer(file)
    text = "x" + " " * 1_200_000 + "y"
    assert processor.decode(processor.encode(text)) == text


def test_neither_sentencepieces_files_nor_json_nor_other_text_are_taken_for_one(tmp_path):
    heads = [
        train_tokenizer(["some words of text. " * 50] * 20, 280)[:64],
        b'{"version": "1.0"}',
        b"IQ== 0",
        b"IQ=== 0\n",
        b"IQ==\t0\n",
        b"hello 0\n",
        b"IQ== zero\n",
        b"\nIQ== 0\n",
        b"",
        b"QUFB" * 16,
    ]
    assert not [head for head in heads if tokenizer_tiktoken.reads(head)]
    assert tokenizer_tiktoken.reads(b"IQ== 0\nIg== 1\n")
    assert not tokenizer_huggingface.reads(b"IQ== 0\nIg== 1\n")


def without(line):
    return lambda content: content.replace(line, b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(b"AQ== 1\n"), "no piece has the rank 1, though others have higher ones"),
        (lambda content: content.replace(b"AQ== 1\n", b"AQ== 264\n"), "no piece has the rank 1,"),
        (lambda content: content.replace(b"/w== 255\n", b"eHh4 255\n"), "no piece for the byte 0xff, and 0 others"),
        (lambda content: content[:-3], "two of its pieces have one rank"),
        (lambda content: content[:1000] + bytes(9) + content[1009:], r"line \d+ is not a piece in base64"),
        (lambda content: content + b"= 264\n", "line 265 is not a piece in base64, a space and its rank"),
        (lambda content: content + b"eHg= -1\n", "line 265 is not a piece"),
        (lambda content: content + b"eHg= 99999999999\n", "line 265 is not a piece"),
        (lambda content: content + b"eHg= 7\n", "two of its pieces have one rank"),
        (lambda content: content + b"AQ== 264\n", "line 265 has a piece that an earlier line has"),
        (lambda content: content + b"A" * (1 << 26), "over 67,108,864 bytes"),
    ],
)
def test_damaged_and_hostile_files_are_refused_by_what_is_wrong(file, change, message):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"t\.tiktoken is no whole file of tiktoken's: .*({message}).*; fetch or write"
    ):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([b"x" * (1 << 15)], "has a piece of over 32,767 bytes"),
        ([b"%05d" % number for number in range((1 << 16) - 256)], "has 65,537 pieces; the shards"),
    ],
)
def test_what_shards_and_tables_cannot_hold_is_refused(file, more, message):
    pytest.importorskip("tiktoken")
    write_tiktoken(file, more=more)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(file)


def test_what_decodes_as_base64_is_what_was_encoded():
    for piece in (b"a", b"ab", b"abc", b"abcd", bytes(range(256))):
        assert tokenizer_tiktoken.LINE.fullmatch(base64.b64encode(piece) + b" 0")[1] == base64.b64encode(piece)
