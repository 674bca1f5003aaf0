"""One stream of tokens over the shards, and the chunks in which test-time training reads it.

n tokens of a chunk. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.data.shards import Shard
from hymba_lightning.data.token_bytes import TokenBytes

CHECKED_TOKENS = 4096


class Chunk(NamedTuple):
    """A piece of the validation stream for score-first test-time training."""

    index: int  # type: ignore[assignment]
    """Place in the stream, from 0."""
    n_chunks: int
    """Chunks of the whole stream."""
    tokens: Tensor
    """(n+1,) int64: the first is the context of the first target."""
    target_bytes: Tensor
    """(n,) int16: UTF-8 bytes of tokens[1:]."""
    start: int | None = None
    """Position of tokens[0] in the stream; None where it is not known."""


class TokenStream:
    """Several shards read as one sequence of tokens, nothing loaded before it is asked for.

    Args:
        paths: Shard files, in the order of the stream.
        vocab_size: Ids must be below this. None: ids are not checked.
        limit: Use only the first `limit` tokens.

    Raises:
        ShardError: A file is no valid shard.
    """

    def __init__(
        self, paths: Iterable[str | os.PathLike[str]], vocab_size: int | None = None, limit: int | None = None
    ) -> None:
        self._shards = [Shard(path, vocab_size) for path in paths]
        ends = np.cumsum([shard.n_tokens for shard in self._shards]).tolist()
        self._starts = [0, *ends]
        total = self._starts[-1]
        self.n_tokens = total if limit is None else min(limit, total)
        """Tokens of the stream."""

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, tokens: slice) -> Tensor:
        """stream[a:b] as an int64 tensor (b-a,), bounds clipped as Python clips them."""
        start, stop, step = tokens.indices(self.n_tokens)
        if step != 1:
            raise ValueError("a token stream is sliced in steps of 1")
        return torch.from_numpy(self.read(start, max(stop - start, 0)))

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from position `start` on, int64; past the end the stream begins again."""
        pieces = []
        position = start % self.n_tokens if self.n_tokens else 0
        while length > 0:
            index = bisect_right(self._starts, position) - 1
            shard, first = self._shards[index], self._starts[index]
            stop = min(position + length, first + shard.n_tokens, self.n_tokens)
            pieces.append(shard.read(position - first, stop - first))
            length -= stop - position
            position = stop % self.n_tokens
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def locate(self, position: int) -> tuple[Path, int]:
        """Shard file, and offset in it, of the token at `position` (of the endless stream)."""
        position %= self.n_tokens
        index = bisect_right(self._starts, position) - 1
        return self._shards[index].path, position - self._starts[index]


def n_chunks(stream: TokenStream, chunk_tokens: int) -> int:
    """Chunks of `chunk_tokens` targets that cover every token after the first; the last may be shorter."""
    return -(-(stream.n_tokens - 1) // chunk_tokens)


def chunk_at(stream: TokenStream, token_bytes: TokenBytes, chunk_tokens: int, index: int) -> Chunk:
    """Chunk `index` of the stream: targets 1 + index·chunk_tokens and on, preceded by one token of context."""
    start = index * chunk_tokens
    tokens = stream[start : start + chunk_tokens + 1]
    return Chunk(
        index, n_chunks(stream, chunk_tokens), tokens, target_bytes(token_bytes, tokens[:-1], tokens[1:]), start
    )


def target_bytes(token_bytes: TokenBytes, previous: Tensor, targets: Tensor) -> Tensor:
    """Bytes of text of each target, given the token before it: int16, of their shape."""
    return torch.from_numpy(token_bytes.count(previous.numpy(), targets.numpy()))


def check_scorable(stream: TokenStream, token_bytes: TokenBytes, files: str) -> None:
    """
    Raises:
        ValueError: a validation text of which no score in bits per byte can be had.
    """
    if stream.n_tokens < 2:
        raise ValueError(
            f"the shards that match data.val_files={files!r} hold {stream.n_tokens} token; scoring needs at least 2, "
            "one of them as context"
        )
    # Of most texts the first one has some.
    chunks = (chunk_at(stream, token_bytes, CHECKED_TOKENS, index) for index in range(n_chunks(stream, CHECKED_TOKENS)))
    if any(int(chunk.target_bytes.sum()) for chunk in chunks):
        return
    raise ValueError(
        f"the {stream.n_tokens - 1:,} validation tokens that are scored stand for 0 bytes of text: raise "
        "data.val_tokens_limit, or prepare more text"
    )
