"""Byte-level byte-pair encodings of Hugging Face's `tokenizers`: a tokenizer.json, as GPT-2, Llama 3 and Qwen have one.

Their pieces are bytes of the text, so that whatever has a piece for each of the 256 bytes and changes no text is exact.
The package is imported only for such a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hymba_lightning.data.tokenizer import ByteTokenizer
from hymba_lightning.text import printable

# Names under which vocabularies keep the token that begins a document, and the one that ends it.
BOS_NAMES = ("<s>", "<bos>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|endoftext|>")
# No vocabulary of the world has as many ids; a table of all of them is kept.
MOST_IDS = 1 << 20
# Steps before the merges that cut a text and take nothing from it.
CUTTING_STEPS = ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts")
INSTALL = "pip install 'hymba-lightning[tokenizers]'"


def reads(head: bytes) -> bool:
    """Whether a file that begins so is one of these: JSON."""
    return head.lstrip()[:1] == b"{"


def byte_symbols() -> dict[str, int]:
    """The character that stands for each byte: itself if it is printable, else one from U+0100 on (as in GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class HuggingFaceTokenizer(ByteTokenizer):
    """
    Args:
        content: The file's JSON, which `check_exact` has passed.
        tokenizer: The loaded `tokenizers.Tokenizer`.

    Raises:
        ValueError: It may change a text, does not know every byte, or has no token that begins a document.
    """

    def __init__(self, content: dict[str, Any], tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # "<s>" in a text is text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        symbols = byte_symbols()
        vocabulary: dict[str, int] = content["model"]["vocab"]
        unknown = [byte for symbol, byte in symbols.items() if symbol not in vocabulary]
        if unknown:
            raise ValueError(f"it has no piece for the byte {unknown[0]:#04x}, and {len(unknown) - 1} others")
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        self._controls = {token["id"] for token in added.values() if token.get("special")}
        ids = vocabulary | {name: token["id"] for name, token in added.items()}
        if len(set(ids.values())) < len(ids) or max(ids.values()) >= MOST_IDS:
            raise ValueError(f"two of its pieces have one id, or one has an id over {MOST_IDS:,}")
        self._raw = [b""] * (max(ids.values()) + 1)
        for piece, token in ids.items():
            if piece in added:
                self._raw[token] = b"" if token in self._controls else piece.encode()
            elif set(piece) <= symbols.keys():
                self._raw[token] = bytes(symbols[symbol] for symbol in piece)
            else:
                raise ValueError(f"its piece {printable(piece, 40)} stands for no bytes")
        special = {name: token["id"] for name, token in added.items() if token["id"] in self._controls}
        self._bos = next((special[name] for name in BOS_NAMES if name in special), -1)
        self._eos = next((special[name] for name in EOS_NAMES if name in special), -1)
        if self._bos < 0:
            raise ValueError(f"it has no special token that begins a document, such as {', '.join(BOS_NAMES)}")

    def get_piece_size(self) -> int:
        return len(self._raw)

    def bos_id(self) -> int:
        return self._bos

    def eos_id(self) -> int:
        return self._eos

    def id_to_piece(self, token: int) -> str:
        """What the file calls the id."""
        return self._tokenizer.id_to_token(token)

    def to_json(self) -> str:
        """The file's content, without truncation and padding."""
        return self._tokenizer.to_str()

    def is_control(self, token: int) -> bool:
        return token in self._controls

    def raw(self, token: int) -> bytes:
        return self._raw[token]

    def encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def check_exact(content: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: The settings are not those of a byte-level encoding that gives every text back as it was.
    """
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"its model is {model.get('type')}, and only a byte-level BPE counts every byte")
    if model.get("dropout"):
        raise ValueError("its dropout makes another encoding of a text each time")
    for setting in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"its {setting} stands in pieces and in no text")
    if content.get("normalizer"):
        raise ValueError(f"its normalizer {content['normalizer'].get('type')} changes texts")
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    others = [str(step.get("type")) for step in steps if step.get("type") not in (*CUTTING_STEPS, None)]
    if others:
        raise ValueError(f"its pre-tokenizer {printable(others[0], 40)} may take characters from a text")
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if not levels:
        raise ValueError("its pre-tokenizer is not byte-level")
    if any(step.get("add_prefix_space") for step in levels):
        raise ValueError("its add_prefix_space puts a space in front of texts")
    if any(step.get("behavior") == "Removed" for step in steps):
        raise ValueError("its pre-tokenizer removes characters")
    for token in content.get("added_tokens") or []:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            raise ValueError(f"its added token {token['content']!r} takes the spaces beside it")


def _loaded(library: Any, text: str) -> Any:
    """The package's own object. Raises ValueError for whatever it raises, panics of its Rust code too."""
    try:
        return library.from_str(text)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the package tokenizers cannot read it ({printable(str(error), 300)})") from error


def load(path: str | os.PathLike[str]) -> HuggingFaceTokenizer:
    """
    Raises:
        ImportError: The package is not installed.
        ValueError: The file is none of these, or does not count every byte.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"{path} is a file of Hugging Face's tokenizers, which is not installed: {INSTALL}"
        ) from error
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no tokenizer.json ({error})") from error
    try:
        # First, since the package ends in a panic over some of what is refused.
        check_exact(content)
        return HuggingFaceTokenizer(content, _loaded(Tokenizer, text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; train a byte-level BPE without normalizer") from error
