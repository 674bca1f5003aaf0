"""An artifact's own evaluation as an evaluator to audit, in this process or in several beside one another."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.checkpoints import check_tokenizer
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.errors import UserError
from hymba_lightning.evaluation.auditor import Evaluator, Probe
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.ttt import ScoreFirstTTT, score_first_ttt
from hymba_lightning.model import Hymba
from hymba_lightning.quantization import load_artifact

# Networks kept for probes, as trained on what lies before a position.
MOST_KEPT = 4


@contextlib.contextmanager
def artifact_evaluator(
    path: Path, sizes: dict[str, int], tokenizer: Path, device: str, ttt: TTTConfig, jobs: int = 1
) -> Iterator[tuple[Evaluator, Probe]]:
    """What `audit` calls: a stream's nats under `ttt`, each time from the artifact's weights, and one token's alone.

    Args:
        path: Artifact.
        sizes: seq_len and chunk_tokens.
        tokenizer: Its tokenizer.
        device: Where the network lives.
        ttt: How it is scored and adapts.
        jobs: Calls that may be made at a time, from as many threads; each then has a process of its own.

    Raises:
        ValueError: The artifact is damaged, or was made for another tokenizer.
    """
    evaluation = _Evaluation(path, sizes, tokenizer, device, ttt)
    if jobs == 1:
        yield evaluation.whole, evaluation.one
        return
    context = multiprocessing.get_context("spawn")
    arguments = (path, sizes, tokenizer, device, ttt)
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=arguments) as pool:

        def elsewhere(call: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(call, *arguments).result()
            except BrokenExecutor as error:
                raise UserError("a process of the audit was killed, for its memory maybe: give --jobs 1") from error

        try:
            yield (
                lambda tokens: torch.from_numpy(elsewhere(_whole, tokens.numpy())),
                lambda tokens, position: elsewhere(_one, tokens.numpy(), position),
            )
        finally:
            pool.shutdown(cancel_futures=True)


class _Evaluation:
    """An artifact's evaluation in one process. Arguments and errors are those of `artifact_evaluator`."""

    def __init__(self, path: Path, sizes: dict[str, int], tokenizer: Path, device: str, ttt: TTTConfig) -> None:
        artifact = load_artifact(path)
        fingerprint = artifact.tokenizer.get("sha256")
        if fingerprint is not None:
            check_tokenizer(path, fingerprint, file_sha256(tokenizer), tokenizer, "--tokenizer")
        self._token_bytes = TokenBytes.from_model(tokenizer)
        self._net = artifact.network().to(device)
        self._seq_len, self._chunk_tokens = sizes["seq_len"], sizes["chunk_tokens"]
        # A clock would make scores depend on the machine's load.
        self._config = dataclasses.replace(ttt, limit_seconds=None)
        self._kept: dict[tuple[int, bytes], ScoreFirstTTT] = {}

    def whole(self, tokens: Tensor) -> Tensor:
        """Nats (n-1,) of a stream (n,)."""
        scored = score_first_ttt(self._fresh_net(), self._chunks(tokens), self._seq_len, self._config, stream=tokens)
        return torch.cat([chunk.nats for chunk in scored])

    def one(self, tokens: Tensor, position: int) -> float:
        """Nats of the token at a position, final once its chunk is scored; NaN where it is not scored.

        Streams that are the same up to that chunk share the training on what lies before it.
        """
        index = (position - 1) // self._chunk_tokens
        before, chunk = self._before(tokens, index), self._chunks(tokens)[index]
        ttt = copy.copy(before)
        # Scoring changes the scorer's state, not the network.
        ttt.scorer = copy.deepcopy(before.scorer, {id(before.net): before.net})
        ttt.stream = tokens
        nats = ttt.score_chunk(chunk).nats
        place = position - 1 - index * self._chunk_tokens
        return float(nats[place]) if place < nats.numel() else math.nan

    def _before(self, tokens: Tensor, index: int) -> ScoreFirstTTT:
        """Scored and trained on all chunks before `index`."""
        key = (tokens.numel(), tokens[: index * self._chunk_tokens + 1].numpy().tobytes())
        ttt = self._kept.pop(key, None)
        if ttt is None:
            ttt = ScoreFirstTTT(self._fresh_net(), self._seq_len, self._config, stream=tokens)
            for chunk in self._chunks(tokens)[:index]:
                ttt.score_chunk(chunk)
                ttt.adapt_chunk(chunk)
            # Momentum and gradients, which only further training would need.
            ttt.adapter = ttt._gradients = None
        while len(self._kept) >= MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = ttt
        return ttt

    def _fresh_net(self) -> Hymba:
        # Training changes the network.
        return copy.deepcopy(self._net) if self._config.epochs else self._net

    def _chunks(self, tokens: Tensor) -> list[Chunk]:
        starts = range(0, tokens.numel() - 1, self._chunk_tokens)
        pieces = [tokens[start : start + self._chunk_tokens + 1] for start in starts]
        return [
            Chunk(
                index,
                len(pieces),
                piece,
                torch.from_numpy(self._token_bytes.count(piece[:-1].numpy(), piece[1:].numpy())),
                start,
            )
            for index, (start, piece) in enumerate(zip(starts, pieces, strict=True))
        ]


# A process's own.
_own: list[_Evaluation] = []


def _begin(*arguments: Any) -> None:
    # The terminal's Ctrl-C is for the command.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As many processes as cores: threads of theirs would wait for one another.
    torch.set_num_threads(1)
    _own.append(_Evaluation(*arguments))


def _whole(tokens: np.ndarray) -> np.ndarray:
    return _own[0].whole(torch.from_numpy(tokens)).cpu().numpy()


def _one(tokens: np.ndarray, position: int) -> float:
    return _own[0].one(torch.from_numpy(tokens), position)
