"""The shard format: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.

Readers get a memory map whose every access is checked against the file as it is now: a map over a file that has
shrunk would otherwise end the process with a bus error and no message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hymba_lightning.data.paths import find_paths

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 1 << 16

# Ids of this many tokens are checked when a shard is opened; the rest are checked as they are read.
OPEN_CHECK_TOKENS = 1 << 20


class ShardError(ValueError):
    """A shard file cannot be used; the message names the file and the remedy."""


class Shard:
    """One memory-mapped shard.

    Args:
        path: The file.
        vocab_size: Ids must be below this. None: ids are not checked.

    Raises:
        FileNotFoundError: There is no such file.
        ShardError: The header, the size or the ids are wrong.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int | None = None) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.n_tokens = _check_header(self.path)
        self._tokens = np.memmap(self.path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,))
        self.read(0, min(self.n_tokens, OPEN_CHECK_TOKENS))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64 (n,).

        Raises:
            IndexError: The range is outside the shard.
            ShardError: The file vanished or shrank since it was opened, or an id is not below `vocab_size`.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"{self.path}: tokens {start}:{stop} are outside the shard's {self.n_tokens}")
        self._check_still_whole()
        tokens = self._tokens[start:stop].astype(np.int64)
        if self.vocab_size is not None and tokens.size and int(tokens.max()) >= self.vocab_size:
            offset = int(np.argmax(tokens >= self.vocab_size))
            raise ShardError(
                f"{self.path}: token {start + offset} has id {int(tokens[offset])}, but the tokenizer has only "
                f"{self.vocab_size} pieces; use the tokenizer that made this shard, or prepare the data again"
            )
        return tokens

    def _check_still_whole(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise ShardError(
                f"{self.path}: the shard was there when the run began and cannot be read now ({error.strerror}); "
                "put it back and resume from the last checkpoint"
            ) from error
        expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * self.n_tokens
        if size < expected:
            raise ShardError(
                f"{self.path}: the shard shrank from {expected} to {size} bytes while in use; "
                "restore it and resume from the last checkpoint"
            )


def find_shards(files: str | Sequence[str], data_dir: str | os.PathLike[str] = ".") -> list[Path]:
    """Sorted shard files of one path or glob pattern, or of several; relative ones are looked up in `data_dir`.

    Raises:
        FileNotFoundError: A pattern matches no file.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    found: set[Path] = set()
    for pattern in patterns:
        matches = [path for path in find_paths(pattern, data_dir) if path.is_file()]
        if not matches:
            raise FileNotFoundError(
                f"no shard matches {os.path.join(data_dir, os.path.expanduser(pattern))!r}; make shards from text with "
                "`hymba prepare`, or point data_dir and the file patterns at existing ones"
            )
        found.update(matches)
    return sorted(found)


def _check_header(path: Path) -> int:
    """Number of tokens that a valid header declares and the file's size confirms."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    remake = "copy it again, or make it again with `hymba prepare`"
    if size == 0:
        raise ShardError(f"{path}: the shard is empty; {remake}")
    if len(raw) < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes are fewer than the {HEADER_BYTES} of a shard's header; {remake}")
    header = np.frombuffer(raw, dtype="<i4")
    magic, version, n_tokens = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise ShardError(
            f"{path}: not a token shard (its first number is {magic}, a shard's is {MAGIC}); "
            "narrow the file pattern so that it matches shards only"
        )
    if version != VERSION:
        raise ShardError(f"{path}: shard version {version}, only version {VERSION} is known; {remake}")
    expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * n_tokens
    if n_tokens <= 0 or size != expected:
        raise ShardError(
            f"{path}: the header declares {n_tokens} tokens, that is {expected} bytes, but the file has {size}; "
            f"{remake}"
        )
    return n_tokens
