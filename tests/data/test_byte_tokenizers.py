"""Tokenizers of other libraries: any text survives and its bytes are counted exactly."""

import sys

import pytest
from byte_tokenizers import write_tiktoken, write_tokenizer_json
from hypothesis import example, given, settings
from test_token_bytes import SAMPLE, texts

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.generation.text import TextStream

WRITERS = {"tokenizers": lambda path: write_tokenizer_json(path, SAMPLE), "tiktoken": write_tiktoken}


@pytest.fixture(scope="module", params=WRITERS)
def file(request, tmp_path_factory):
    pytest.importorskip(request.param)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    WRITERS[request.param](path)
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


def test_documents_begin_with_bos_which_counts_nothing(encoder, file):
    bos = encoder.processor.bos_id()
    ids = encoder.encode_pieces(encoder.cut("ab")).astype(int)
    assert ids[0] == bos
    assert bos not in ids[1:]
    table = TokenBytes.from_model(file)
    assert table.count(ids[:1], ids[:1]).tolist() == [0]
    assert table.count(ids[:-1], ids[1:]).sum() == 2


def test_half_a_surrogate_pair_is_an_error_and_no_other_character(encoder):
    with pytest.raises(ValueError, match="not UTF-8 at its character 3; give it as UTF-8"):
        encoder.encode("a \ud800 b")


def test_prepared_text_is_read_back_with_it(file, tmp_path):
    text = "\n".join(SAMPLE * 4).replace("\r", "") + " <s> 日本 "
    (tmp_path / "a.txt").write_text(text)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), tokenizer=str(file), workers=1, val_fraction=0.3)
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=8)
    data.setup("fit")
    assert data.vocab_size == load_tokenizer(file).get_piece_size()
    both = [data.train_spans.stream, data.val_stream()]
    assert "".join(data.processor.decode(stream[:].tolist()) for stream in both) == text
    counted = [data.token_bytes.count(stream[:-1].numpy(), stream[1:].numpy()).sum() for stream in both]
    assert sum(map(int, counted)) == len(text.encode())


@pytest.mark.parametrize(
    ("package", "content", "command"),
    [
        ("tokenizers", "{}", r"pip install 'hymba-lightning\[tokenizers\]'"),
        ("tiktoken", None, "pip install tiktoken"),
    ],
)
def test_without_the_package_its_install_command_is_named(tmp_path, monkeypatch, package, content, command):
    write_tiktoken(tmp_path / "t") if content is None else (tmp_path / "t").write_text(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=command):
        load_tokenizer(tmp_path / "t")
