"""Files of byte-level tokenizers of other libraries, made here."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import pytest

# Pieces of a tiktoken file, behind the bytes.
MERGES = [b" w", b" wi", b" wid", b" width", b"width", "日本".encode(), b"\n\n", b"  "]


def write_tokenizer_json(path: Path, texts: Iterable[str], vocab_size: int = 300) -> None:
    """A vocabulary with two special tokens and, behind it, one that is text; longer texts would be cut at 5 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["width!!"])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))


def write_tiktoken(path: Path, more: Iterable[bytes] = MERGES) -> None:
    """The bytes and then `more`."""
    pieces = [bytes([byte]) for byte in range(256)] + list(more)
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)))
