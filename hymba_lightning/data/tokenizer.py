"""Tokenizers: loading with clear errors, training so that encoding loses nothing, fingerprints.

SentencePiece's are at home here. Those of another library are in a file `tokenizer_<library>.py` of this folder with
two functions: `reads(head)`, whether a file that begins with these bytes is one of its, and `load(path)`, which gives a
`ByteTokenizer`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import sentencepiece

from hymba_lightning.data.shards import MAX_VOCAB_SIZE
from hymba_lightning.text import printable

SPACE = "▁"
TOKENIZER_FILE = "tokenizer.model"

# pad, BOS, EOS, unknown and one piece per byte: no byte-fallback vocabulary can be smaller.
N_SPECIAL = 4 + 256

# SentencePiece itself takes no piece as long.
MAX_PIECE = (1 << 15) - 1

# SentencePiece writes the number into the model: one that followed the machine would change the fingerprint.
TRAINING_THREADS = 4


class ByteTokenizer(ABC):
    """A tokenizer whose pieces are bytes of the text as it is; stands in the place of a SentencePieceProcessor."""

    @abstractmethod
    def get_piece_size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def bos_id(self) -> int:
        """Begins every document."""

    @abstractmethod
    def eos_id(self) -> int:
        """Ends a document; -1 where there is none."""

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Whether the id stands for no text."""

    @abstractmethod
    def raw(self, token: int) -> bytes:
        """The text that the id stands for, maybe a part of a character; empty for a control."""

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, whose bytes in a row are the text's UTF-8, whatever stands in it."""

    def encode(self, text: str | list[str]) -> Any:
        """Ids of a text, or of each of several."""
        return self.encode_text(text) if isinstance(text, str) else [self.encode_text(each) for each in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return b"".join(map(self.raw, ids)).decode(errors="replace")

    def unk_id(self) -> int:
        """None: every byte is known."""
        return -1

    def pad_id(self) -> int:
        """None."""
        return -1


def _other_libraries() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    package = __name__.rpartition(".")[0]
    return [importlib.import_module(f"{package}.{name}") for name in names if name.startswith("tokenizer_")]


def _names_of_other_libraries() -> str:
    return " or ".join(module.__name__.rpartition(".tokenizer_")[2] for module in _other_libraries())


def load_tokenizer(path: str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model, or what another library's file gives in its place (a `ByteTokenizer`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no tokenizer, has no BOS piece, or more pieces than shards have ids.
        ImportError: The library of the file is not installed.
    """
    check_is_there(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty; set the tokenizer to a whole file")
    library = next((library for library in _other_libraries() if library.reads(head)), None)
    processor = _load_sentencepiece(path) if library is None else library.load(path)
    if (n_pieces := processor.get_piece_size()) > MAX_VOCAB_SIZE:
        raise ValueError(f"{path} has {n_pieces:,} pieces; the shards' uint16 holds ids below {MAX_VOCAB_SIZE:,}")
    if isinstance(processor, ByteTokenizer) and max(len(processor.raw(token)) for token in range(n_pieces)) > MAX_PIECE:
        raise ValueError(f"{path} has a piece of over {MAX_PIECE:,} bytes; the table of bytes per token is int16")
    return processor


def _load_sentencepiece(path: str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(os.fspath(path))
        # A damaged piece that is no text is found only when it is asked for.
        processor.id_to_piece(list(range(processor.get_piece_size())))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model ({printable(str(error))}), nor by its first bytes a file of "
            f"{_names_of_other_libraries()}; set the tokenizer to one of these, unpacked and without byte-order mark"
        ) from error
    if processor.bos_id() < 0:
        raise ValueError(f"{path} has no BOS piece, which must begin every document; use a tokenizer with bos_id ≥ 0")
    return processor


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, character_coverage: float = 0.9995) -> bytes:
    """Train a byte-pair encoding that decodes to exactly the text it was given; returns the serialized model.

    Characters outside the vocabulary become byte pieces, nothing is normalised, every whitespace is kept, and the space
    is always a piece. Ids: pad 0, BOS 1, EOS 2, unknown 3, then the bytes.

    Args:
        texts: The sample, in pieces of a few kilobytes (a piece over 16 KiB is ignored by SentencePiece).
        vocab_size: Pieces, 261 … 65,536.
        character_coverage: Share of the sample's characters that get pieces of their own.

    Raises:
        ValueError: The size is out of range, or the sample is too small or too varied for it.
    """
    if not N_SPECIAL < vocab_size <= 1 << 16:
        raise ValueError(f"vocab_size is {vocab_size}; it must lie in {N_SPECIAL + 1} … 65,536")
    texts = [text.replace(SPACE, " ") for text in texts]
    model = _train(texts, vocab_size, character_coverage)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.id_to_piece(processor.piece_to_id(SPACE)) == SPACE:
        return model
    # A text without spaces: where one comes all the same, it must count as the one byte that it is.
    return _train(texts, vocab_size, character_coverage, required_chars=SPACE)


def _train(texts: list[str], vocab_size: int, character_coverage: float, **more: Any) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            # The prefix lets the byte count tell a document's first word from one after a space.
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 14,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            num_threads=TRAINING_THREADS,
            minloglevel=2,
            **more,
        )
    except RuntimeError as error:
        # The library's message begins with the place in its code.
        cause = str(error).rpartition("] ")[2].strip().rstrip(".") or "it holds no words"
        raise ValueError(
            f"no tokenizer of vocab_size={vocab_size} can be trained on this text ({cause}); with little text lower "
            "vocab_size, with many scripts raise it or lower character_coverage"
        ) from error
    return model.getvalue()


def check_is_there(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        OSError: there is no file of a tokenizer; what may be meant is told.
    """
    inside = os.path.join(path, TOKENIZER_FILE)
    if os.path.isfile(inside):
        raise IsADirectoryError(f"{path} is a folder, and a tokenizer's file is needed (did you mean {inside}?)")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer at {path}; `hymba prepare` makes one, or set data.tokenizer to its path")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
