"""Writing shards: whole or not at all, and going on after a kill."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from hymba_lightning.data.shards import HEADER_BYTES, HEADER_INTS, MAGIC, MAX_VOCAB_SIZE, TOKEN_DTYPE, VERSION
from hymba_lightning.files import naming

MAX_SHARD_TOKENS = (1 << 31) - 1


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
