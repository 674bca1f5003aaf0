"""Byte-pair encodings of tiktoken: a line `base64 rank` for each piece, as OpenAI's files and Llama 3's have them.

Such a file says neither where a text is cut into words nor which tokens are special. The two of OpenAI's that shards
can hold are known by their SHA-256 and cut as GPT-2 does; every other file is cut as GPT-4 and Llama 3 do. BOS is the
first id that no piece has: <|endoftext|> for OpenAI's two, <|begin_of_text|> for a file like Llama 3's.

The package is imported only for such a file.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from itertools import count
from typing import Any

from hymba_lightning.data.tokenizer import ByteTokenizer

# Base64 comes in fours.
LINE = re.compile(rb"(?=(?:\S{4})+ )([A-Za-z0-9+/]+={0,2}) (\d{1,7})")
MOST_BYTES = 1 << 26
# r50k_base (GPT-2, GPT-3) and p50k_base (Codex), which has no piece 50,256.
GPT2_FILES = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
}
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# Over a million spaces in a row the package's regular expressions end in a panic.
PART_CHARS = 1 << 19
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{PART_CHARS}}}")


def reads(head: bytes) -> bool:
    """Whether a file that begins so is one of these: its first line is a piece and its rank."""
    return LINE.fullmatch(head.splitlines()[0] if b"\n" in head else b"") is not None


class TiktokenTokenizer(ByteTokenizer):
    """A vocabulary of tiktoken with BOS as its only control.

    Args:
        ranks: Ids of the pieces, with one for each byte.
        encoding: A `tiktoken.Encoding` of these.
    """

    def __init__(self, ranks: dict[bytes, int], encoding: Any) -> None:
        self._encoding = encoding
        self._raw = {token: piece for piece, token in ranks.items()}
        self._bos = next(token for token in count() if token not in self._raw)
        self._n_ids = max(self._bos, *self._raw) + 1

    def get_piece_size(self) -> int:
        return self._n_ids

    def bos_id(self) -> int:
        return self._bos

    def eos_id(self) -> int:
        return -1

    def is_control(self, token: int) -> bool:
        return token == self._bos

    def raw(self, token: int) -> bytes:
        return self._raw.get(token, b"")

    def encode_text(self, text: str) -> list[int]:
        # Raises for half a surrogate pair, which the package would replace by another character.
        text.encode()
        if len(text) <= PART_CHARS or LONG_SPACE.search(text) is None:
            return self._encoding.encode_ordinary(text)
        parts = (text[start : start + PART_CHARS] for start in range(0, len(text), PART_CHARS))
        return [token for part in parts for token in self._encoding.encode_ordinary(part)]


def read_ranks(content: bytes, gaps: bool = False) -> dict[bytes, int]:
    """Id of each piece.

    Raises:
        ValueError: A line is none of tiktoken's, a piece or a rank comes twice, a byte has no piece, or (without
            `gaps`) a rank below the highest is missing.
    """
    ranks: dict[bytes, int] = {}
    # The package's own reader drops what is no base64, lets a second line for a piece pass, and keeps copies of files
    # by their path, so that it may give a former content.
    for number, line in enumerate(content.splitlines(), 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not a piece in base64, a space and its rank")
        piece = base64.b64decode(match[1])
        if piece in ranks:
            raise ValueError(f"line {number} has a piece that an earlier line has")
        ranks[piece] = int(match[2])
    tokens = set(ranks.values())
    if len(tokens) < len(ranks):
        raise ValueError("two of its pieces have one rank")
    if not gaps and (missing := next(token for token in count() if token not in tokens)) < len(tokens):
        raise ValueError(f"no piece has the rank {missing:,}, though others have higher ones")
    if unknown := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"it has no piece for the byte {unknown[0]:#04x}, and {len(unknown) - 1} others")
    return ranks


def load(path: str | os.PathLike[str]) -> TiktokenTokenizer:
    """Reads a file of tiktoken's.

    Raises:
        ImportError: The package is not installed.
        ValueError: The file is damaged, or does not know every byte.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has over {MOST_BYTES:,} bytes")
        known = hashlib.sha256(content).hexdigest() in GPT2_FILES
        ranks = read_ranks(content, gaps=known)
    except ValueError as error:
        raise ValueError(f"{path} is no whole file of tiktoken's: {error}; fetch or write it anew") from error
    try:
        from tiktoken import Encoding
    except ImportError as error:
        raise ImportError(f"{path} is a file of tiktoken's, which is not installed: pip install tiktoken") from error
    words = GPT2_WORDS if known else GPT4_WORDS
    return TiktokenTokenizer(ranks, Encoding(os.fspath(path), pat_str=words, mergeable_ranks=ranks, special_tokens={}))
