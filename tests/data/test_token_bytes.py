"""Bytes per target: the reference's tables exactly, and the text's own length on any text."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hymba_lightning.data import text_encoder
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLE = [
    "def area(width, height):\n    if width < 0:\n        raise ValueError('négative')\n    return width * height\n\n",
    "The quick brown fox jumps over the lazy dog. 1, 22, 333.\r\n\ttabs  and   runs    of     spaces\n",
    "class Größe:\n    pass  # naïve café\n",
] * 20
TRICKY = ["▁", " ", "  ", "\n", "\t", "\r\n", "\0", "<s>", "</s>", "<0x41>", "\ufeff", "é", "日本", "\U0010fffd"]

words = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([*TRICKY, *SAMPLE[:3], "width"]))
texts = st.lists(words, max_size=12).map("".join)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    model = train_tokenizer(SAMPLE, 400)
    return TextEncoder(sentencepiece.SentencePieceProcessor(model_proto=model))


@pytest.fixture(scope="module")
def challenge_encoder() -> TextEncoder:
    return TextEncoder(load_tokenizer(GOLDEN / "sp1024.model"))


def test_tables_equal_the_references() -> None:
    ours = TokenBytes.from_model(GOLDEN / "sp1024.model")
    golden = np.load(GOLDEN / "byte_luts_sp1024.npz", allow_pickle=False)
    assert set(golden) == {"base_bytes", "has_leading_space", "is_boundary"}
    for name, table in golden.items():
        assert np.array_equal(getattr(ours, name), table), name
        assert getattr(ours, name).dtype == table.dtype, name


def test_counts_equal_the_references() -> None:
    ours = TokenBytes.from_model(GOLDEN / "sp1024.model")
    golden = json.loads((GOLDEN / "bytes_per_token.json").read_text())
    for row in golden["rows"]:
        ids = np.array(row["ids"])
        counted = ours.count(ids[:-1], ids[1:])
        assert counted.dtype == np.int16
        assert counted.tolist() == row["bytes_per_target"], row["text"]


def test_kinds_of_pieces() -> None:
    """Byte 1, control and unknown 0 and a space after them free; a space inside a piece is one byte, not three."""
    model = train_tokenizer(["a    b    c    " * 200], 270)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = TokenBytes.from_processor(processor)
    four_spaces = processor.piece_to_id("▁▁▁▁")
    assert four_spaces != processor.unk_id()
    bos, byte = processor.bos_id(), processor.piece_to_id("<0x0A>")
    pairs = np.array([(bos, four_spaces), (byte, four_spaces), (four_spaces, byte), (byte, bos), (byte, 3)])
    assert ours.count(pairs[:, 0], pairs[:, 1]).tolist() == [3, 4, 1, 0, 0]


@given(texts)
@settings(max_examples=150, deadline=None)
@example("▁")
@example("▁ ▁\U0010fffd ▁▁a")
@example(" leading")
@example("\n")
def test_any_text_survives_and_its_bytes_are_counted_exactly(encoder: TextEncoder, text: str) -> None:
    assert encoder.processor.decode(encoder.encode(text).tolist()) == text
    audit = encoder.audit(text)
    assert audit.counted_bytes == audit.text_bytes == len(text.encode())
    assert audit.exact


@given(st.lists(words, min_size=1, max_size=40).map(" ".join))
@settings(max_examples=150, deadline=None)
def test_cutting_a_text_does_not_change_its_ids(encoder, challenge_encoder, text: str) -> None:
    text = text.replace("▁", "")
    for each in (encoder, challenge_encoder):
        whole = each.processor.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_encoder, "PIECE_CHARS", 5)
            assert "".join(piece.text for piece in each.cut(text)) == text
            assert each.encode(text).tolist() == whole


SCRIPTS = {
    "Cyrillic": "однажды в студёную зимнюю пору я из лесу вышел, был сильный мороз. ",
    "Chinese": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "Thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน ",
    "Arabic": "اللُّغَةُ العَرَبِيَّةُ هي أكثرُ اللغاتِ تحدثاً، ",
    "Hangul": "안녕하세요 세계 \u1112\u1161\u11ab",
    "Japanese": "ひらがなとカタカナ、ﾊﾝｶｸ ｶﾞ。が",
    "emoji": "😀👩‍👩‍👧🇩🇪👍🏽❤️ ✊🏿",
    "marks": "e\u0301 ﬁ ① \u200b\u00a0\u3000 कि ো",
    "ACGT": "ACGTTGCA",
    "spaces": "a  b   c\n\n\t d ",
    "strange": "▁\U0010fffd▁<s>\0",
}
some_script = st.sampled_from(list(SCRIPTS)).flatmap(lambda name: st.text(SCRIPTS[name], max_size=40))
of_scripts = st.lists(st.one_of(some_script, words), max_size=12).map("".join)


def trained(texts: list[str], size: int, **options: object) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "character_coverage": 0.98, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, **(defaults | options)
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def script_encoders() -> list[TextEncoder]:
    """Of tokenizers that know these scripts: ours, and others' with other normalisations."""
    texts = [text * 12 for text in SCRIPTS.values()] * 3
    ours = [trained_model(texts, 420), trained_model([SCRIPTS["ACGT"] * 100] * 30, 280)]
    options = [
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
        {"normalization_rule_name": "nfkc_cf", "byte_fallback": True, "add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "treat_whitespace_as_suffix": True},
    ]
    return [TextEncoder(processor) for processor in [*ours, *(trained(texts, 450, **each) for each in options)]]


def trained_model(texts: list[str], size: int) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(texts, size))


@given(of_scripts)
@settings(max_examples=150, deadline=None)
@example("▁\U0010fffd▁")
@example("a b c")
def test_texts_of_any_script_survive_and_are_counted_exactly(script_encoders: list[TextEncoder], text: str) -> None:
    for encoder in script_encoders[:2]:
        assert encoder.processor.decode(encoder.encode(text).tolist()) == text
        assert encoder.audit(text).exact


@given(of_scripts)
@settings(max_examples=150, deadline=None)
@example("語かﾞ" * 9)
@example("s\u0301śa" * 9)
def test_cutting_a_text_of_any_script_does_not_change_its_ids(script_encoders: list[TextEncoder], text: str) -> None:
    text = text.replace("▁", "")
    for encoder in script_encoders:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_encoder, "PIECE_CHARS", 3)
            assert "".join(piece.text for piece in encoder.cut(text)) == text
            assert encoder.encode(text).tolist() == encoder.processor.encode(text)


@pytest.mark.parametrize("script", ["Cyrillic", "Chinese", "Thai", "Arabic", "Japanese", "emoji", "Hangul"])
def test_long_texts_of_any_script_are_cut(script_encoders: list[TextEncoder], script: str) -> None:
    text = SCRIPTS[script] * 1000
    pieces = script_encoders[0].cut(text)
    assert max(len(piece.text) for piece in pieces) < 2200
    assert script_encoders[0].encode(text).tolist() == script_encoders[0].processor.encode(text)


def test_the_stand_in_is_the_vocabularys_not_the_texts() -> None:
    encoder = TextEncoder(trained_model(["\U0010fffd\U0010fffc some text " * 50] * 20, 280))
    for text in ("▁", "\U0010fffd▁\U0010fffd", "\U0010fffb▁\U0010fffc▁\U0010fffd", "a▁\U0010fffb"):
        ids = encoder.encode(text).tolist()
        assert encoder.processor.decode(ids) == text
        assert encoder.audit(text).exact
    alone = encoder.encode("a▁b").tolist()
    assert encoder.encode("\U0010fffb\U0010fffc a▁b").tolist()[-len(alone) + 1 :] == alone[1:]


def test_a_space_is_a_piece_though_the_text_has_none() -> None:
    # In long lines the space that the trainer puts before each is too rare to be a piece.
    processor = trained_model([SCRIPTS["ACGT"] * 1800] * 3, 270)
    assert processor.id_to_piece(processor.piece_to_id("▁")) == "▁"
    assert TextEncoder(processor).audit("a b c").counted_bytes == 5


def test_long_texts_are_cut(encoder: TextEncoder) -> None:
    pieces = encoder.cut("word " * 5000)
    assert max(len(piece.text) for piece in pieces) < 2100
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_vocabulary_that_crosses_spaces_is_not_cut_there() -> None:
    model = train_tokenizer(SAMPLE, 400)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.replace("▁width".encode(), "wi▁dth".encode()))
    encoder = TextEncoder(processor)
    pieces = encoder.cut("kwi dth, " * 3000)
    assert len(pieces) > 10
    assert not [piece.text for piece in pieces if piece.text.startswith((" d", "d"))]
    assert encoder.encode("kwi dth, " * 3000).tolist() == processor.encode("kwi dth, " * 3000)


def test_audit_tells_what_the_challenges_tokenizer_loses(challenge_encoder: TextEncoder) -> None:
    assert challenge_encoder.audit("Plain words, nothing else.").exact
    unknown = challenge_encoder.audit("Żółć")
    assert (unknown.counted_bytes, unknown.text_bytes, unknown.exact) == (0, 8, False)
    collapsed = challenge_encoder.audit("two  spaces")
    assert (collapsed.counted_bytes, collapsed.text_bytes) == (10, 11)


def test_half_a_surrogate_pair_is_refused_as_what_it_comes_from(encoder: TextEncoder) -> None:
    """Python's stand-in for a byte of an argument that is no UTF-8."""
    with pytest.raises(ValueError, match="the text is not UTF-8 at its character 4; give it as UTF-8"):
        encoder.encode("caf\udce9")


def test_bad_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        load_tokenizer(tmp_path / "none.model")
    bad = tmp_path / "bad.model"
    others = r"bad\.model is not a SentencePiece model .*, nor by its first bytes a file of huggingface or tiktoken"
    for content in (b"no model at all", b"\xef\xbb\xbfIQ== 0\n", gzip.compress(b"IQ== 0\n")):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=others):
            load_tokenizer(bad)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.model is empty"):
        load_tokenizer(bad)


@pytest.mark.parametrize(("size", "message"), [(260, "must lie in 261"), (70000, "65,536"), (5000, "lower vocab_size")])
def test_impossible_vocabulary_sizes(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(SAMPLE, size)
