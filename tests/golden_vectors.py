"""Loads the reference's test vectors (tests/golden) as networks, streams and arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation import TTTConfig
from hymba_lightning.interop.reference import from_reference
from hymba_lightning.model import Hymba

FOLDER = Path(__file__).parent / "golden"


def arrays(name: str) -> dict[str, Tensor]:
    """All arrays of an npz file as tensors."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key].copy()) for key in file}


def settings(name: str) -> dict[str, Any]:
    """A json file's content."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def network(config: dict[str, Any], vectors: dict[str, Tensor]) -> Hymba:
    """The vectors' network, through the same import that users have."""
    weights = {key.removeprefix("param/"): value for key, value in vectors.items() if key.startswith("param/")}
    return from_reference(config, weights)


def ttt_chunks(vectors: dict[str, Tensor], chunk_tokens: int, n_tokens: int | None = None) -> list[Chunk]:
    """The token stream of ttt.npz in chunks, with the bytes of each target."""
    tokens = vectors["tokens"].long()[:n_tokens]
    previous, targets = tokens[:-1], tokens[1:]
    target_bytes = vectors["base_bytes"][targets].short()
    target_bytes += (vectors["has_leading_space"][targets] & ~vectors["is_boundary"][previous]).short()
    n_chunks = -(-targets.numel() // chunk_tokens)
    return [
        Chunk(
            i,
            n_chunks,
            tokens[i * chunk_tokens : (i + 1) * chunk_tokens + 1],
            target_bytes[i * chunk_tokens : (i + 1) * chunk_tokens],
        )
        for i in range(n_chunks)
    ]


def ttt_config(values: dict[str, Any], **changes: Any) -> TTTConfig:
    """The recipe of ttt.json: the reference's, which drops partial sequences."""
    recipe = {
        "epochs": values["epochs"],
        "lr": values["lr"],
        "momentum": values["momentum"],
        "batch_seqs": values["batch_seqs"],
        "freeze_blocks": values["freeze_blocks"],
        "grad_clip": values["grad_clip"],
        "drop_partial": True,
    }
    return TTTConfig(**(recipe | changes))
