"""The shard format: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.

Readers get a memory map whose every access is checked against the file as it is now: a map over a file that has
shrunk would otherwise end the process with a bus error and no message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hymba_lightning.data.paths import find_paths
from hymba_lightning.files import naming

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 1 << 16
MAX_SHARD_TOKENS = (1 << 31) - 1

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


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Write tokens (n,), n ≥ 1, ids in 0 … 65,535, to `path`: whole or not at all.

    Raises:
        ValueError: No tokens, or ids that do not fit uint16.
        OSError: The disk is full or the folder is not writable. Nothing is left behind, an older file stays whole.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0:
        raise ValueError(f"{path}: a shard holds a non-empty vector of tokens, not an array of shape {tokens.shape}")
    file = _ShardFile(Path(path))
    try:
        file.append(tokens)
        file.commit()
    except BaseException:
        file.discard()
        raise


class ShardWriter:
    """Writes a stream of tokens to {prefix}_000000.bin, {prefix}_000001.bin, …, in constant memory.

    A context manager: leaving it normally completes the last shard, leaving it by an exception removes the unfinished
    one, unless its `state` was taken, from which another writer can go on.

    Args:
        folder: Where the shards go.
        prefix: Begin of the files' names.
        shard_tokens: Tokens of every shard but the last.
        state: Of an earlier writer with the same arguments; what it wrote afterwards is overwritten.
    """

    def __init__(self, folder: Path, prefix: str, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        self.paths: list[Path] = []
        """Completed shards."""
        self.n_tokens = 0
        """Tokens given so far."""
        self._folder = folder
        self._prefix = prefix
        self._shard_tokens = shard_tokens
        self._file: _ShardFile | None = None
        self._resumable = state is not None
        if state is not None:
            self.n_tokens = state["tokens"]
            unfinished = self.n_tokens % shard_tokens
            self.paths = [self._path(index) for index in range(self.n_tokens // shard_tokens)]
            if unfinished:
                self._file = _ShardFile(self._path(len(self.paths)), unfinished)

    def state(self) -> dict[str, Any]:
        """Plain values from which to go on, after everything given so far has reached the disk."""
        self._resumable = True
        if self._file is not None:
            self._file.sync()
        return {"tokens": self.n_tokens}

    @staticmethod
    def holds(folder: Path, prefix: str, shard_tokens: int, state: dict[str, Any]) -> bool:
        """Whether what `state` speaks of is in the folder, so that a writer can go on from it."""

        def is_there(index: int, n_tokens: int) -> bool:
            path = folder / f"{prefix}_{index:06d}.bin"
            whole = HEADER_BYTES + TOKEN_DTYPE.itemsize * n_tokens
            return any(each.is_file() and each.stat().st_size >= whole for each in (path, _temporary(path)))

        n_complete, unfinished = divmod(state["tokens"], shard_tokens)
        return all(is_there(index, shard_tokens) for index in range(n_complete)) and (
            not unfinished or is_there(n_complete, unfinished)
        )

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._prefix}_{index:06d}.bin"

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens (n,). Raises ValueError or OSError as `write_shard` does."""
        self.n_tokens += tokens.size
        while tokens.size:
            if self._file is None:
                self._file = _ShardFile(self._path(len(self.paths)))
            room = self._shard_tokens - self._file.n_tokens
            self._file.append(tokens[:room])
            tokens = tokens[room:]
            if self._file.n_tokens == self._shard_tokens:
                self._complete()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: object, traceback: object) -> None:
        if self._file is not None and error_type is None:
            self._complete()
        elif self._file is not None and not self._resumable:
            self._file.discard()

    def _complete(self) -> None:
        if self._file is not None:
            self._file.commit()
            self.paths.append(self._file.path)
            self._file = None


class _ShardFile:
    """A shard being written beside its final name, which it takes when complete.

    Args:
        path: Its final name.
        kept_tokens: Go on after so many tokens of what an earlier process left unfinished.
    """

    def __init__(self, path: Path, kept_tokens: int = 0) -> None:
        self.path = path
        self.n_tokens = kept_tokens
        self._temporary = _temporary(path)
        if kept_tokens and not self._temporary.exists():
            # The earlier process completed the shard after its state was taken.
            os.replace(path, self._temporary)
        with naming(path):
            self._file = open(self._temporary, "r+b" if kept_tokens else "wb")  # noqa: SIM115 (closed by commit or discard)
            self._file.write(bytes(HEADER_BYTES))
            if kept_tokens:
                self._file.truncate(HEADER_BYTES + TOKEN_DTYPE.itemsize * kept_tokens)
                self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """What was appended is on the disk."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, tokens: np.ndarray) -> None:
        if tokens.dtype != TOKEN_DTYPE and (int(tokens.min()) < 0 or int(tokens.max()) >= MAX_VOCAB_SIZE):
            raise ValueError(f"{self.path}: ids must lie in 0 … {MAX_VOCAB_SIZE - 1} to fit the format's uint16")
        with naming(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data)
        self.n_tokens += tokens.size

    def commit(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.n_tokens
        with naming(self.path):
            self._file.seek(0)
            self._file.write(header.tobytes())
            self.sync()
            self._file.close()
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Closing flushes what a full disk has already refused.
            self._file.close()


def _temporary(path: Path) -> Path:
    """Where a shard lies until it is complete."""
    return path.with_name(f".{path.name}.tmp")


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
