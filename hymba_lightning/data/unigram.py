"""The unigram model, which knows how frequent each token is in training and nothing else: the score to beat."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
import torch

from hymba_lightning.data.manifest import read_manifest
from hymba_lightning.data.mixture import Source
from hymba_lightning.data.shards import find_shards
from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.units import bits_per_byte


def token_frequencies(sources: Sequence[Source], train_files: str, vocab_size: int) -> np.ndarray | None:
    """Share of each token id in the training sequences (V,) float64, add-one smoothed; None where a manifest does not
    count the tokens of just those shards that are trained on."""
    total = np.zeros(vocab_size)
    for folder, share in sources:
        manifest = read_manifest(folder)
        if manifest is None or len(manifest["train_token_counts"]) != vocab_size:
            return None
        counted = {os.path.realpath(folder / shard["file"]) for shard in manifest["splits"]["train"]["shards"]}
        used: set[str] = set()
        with suppress(FileNotFoundError):  # a test needs no training shards
            used = {os.path.realpath(path) for path in find_shards(train_files, folder)}
        if used and used != counted:
            return None
        counts = np.array(manifest["train_token_counts"], dtype=np.float64) + 1
        total += float(share) * counts / counts.sum()
    return total


def unigram_bits_per_byte(frequencies: np.ndarray, chunks: Iterable[Chunk]) -> float:
    """Bits per byte of the chunks' targets under these shares of each token id (V,)."""
    nats = -np.log(frequencies)
    total_nats = total_bytes = 0.0
    for chunk in chunks:
        total_nats += float(nats[chunk.tokens[1:].numpy()].sum())
        total_bytes += int(chunk.target_bytes.sum(dtype=torch.int64))
    return bits_per_byte(total_nats, total_bytes)
