"""An artifact's own evaluation as an evaluator to audit, in this process or in several beside one another."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import signal
from collections.abc import Iterator
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
from hymba_lightning.evaluation.auditor import Evaluator
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.ttt import score_first_ttt
from hymba_lightning.quantization import load_artifact


@contextlib.contextmanager
def artifact_evaluator(
    path: Path, sizes: dict[str, int], tokenizer: Path, device: str, ttt: TTTConfig, jobs: int = 1
) -> Iterator[Evaluator]:
    """What `audit` calls: a stream's nats under `ttt`, each time from the artifact's weights.

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
    evaluate = _evaluator(path, sizes, tokenizer, device, ttt)
    if jobs == 1:
        yield evaluate
        return
    context = multiprocessing.get_context("spawn")
    arguments = (path, sizes, tokenizer, device, ttt)
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=arguments) as pool:

        def elsewhere(tokens: Tensor) -> Tensor:
            try:
                return torch.from_numpy(pool.submit(_evaluate, tokens.numpy()).result())
            except BrokenExecutor as error:
                raise UserError("a process of the audit was killed, for its memory maybe: give --jobs 1") from error

        try:
            yield elsewhere
        finally:
            pool.shutdown(cancel_futures=True)


def _evaluator(path: Path, sizes: dict[str, int], tokenizer: Path, device: str, ttt: TTTConfig) -> Evaluator:
    artifact = load_artifact(path)
    fingerprint = artifact.tokenizer.get("sha256")
    if fingerprint is not None:
        check_tokenizer(path, fingerprint, file_sha256(tokenizer), tokenizer, "--tokenizer")
    token_bytes = TokenBytes.from_model(tokenizer)
    net = artifact.network().to(device)
    # A clock would make scores depend on the machine's load.
    config = dataclasses.replace(ttt, limit_seconds=None)

    def evaluate(tokens: Tensor) -> Tensor:
        starts = range(0, tokens.numel() - 1, sizes["chunk_tokens"])
        pieces = [tokens[start : start + sizes["chunk_tokens"] + 1] for start in starts]
        chunks = [
            Chunk(
                index,
                len(pieces),
                piece,
                torch.from_numpy(token_bytes.count(piece[:-1].numpy(), piece[1:].numpy())),
                start,
            )
            for index, (start, piece) in enumerate(zip(starts, pieces, strict=True))
        ]
        # Training changes the network.
        fresh = copy.deepcopy(net) if config.epochs else net
        scored = score_first_ttt(fresh, chunks, sizes["seq_len"], config, stream=tokens)
        return torch.cat([chunk.nats for chunk in scored])

    return evaluate


# A process's own evaluator.
_own: list[Evaluator] = []


def _begin(*arguments: Any) -> None:
    # The terminal's Ctrl-C is for the command.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As many processes as cores: threads of theirs would wait for one another.
    torch.set_num_threads(1)
    _own.append(_evaluator(*arguments))


def _evaluate(tokens: np.ndarray) -> np.ndarray:
    return _own[0](torch.from_numpy(tokens)).cpu().numpy()
