"""Bits per byte document by document: each begins with BOS and an empty state, and is read whole, however long.

B documents of a batch, T tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from hymba_lightning.data.documents import DocumentReader, unescaped
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, find_inputs
from hymba_lightning.data.skips import Skips
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.evaluation.carried import score_onward
from hymba_lightning.evaluation.score import Score
from hymba_lightning.model import Hymba

# For what cannot be read: a score of the rest would be another text's.
REMEDY = "leave it out, or mend it"


@dataclass(frozen=True)
class DocumentScore:
    """One document's score, over the UTF-8 bytes that the text itself has."""

    name: str
    score: Score

    def as_dict(self) -> dict[str, str | float | int]:
        """Plain values."""
        score = self.score
        return {
            "document": self.name,
            "bits_per_byte": score.bpb,
            "nats": score.nats,
            "tokens": score.n_tokens,
            "bytes": score.n_bytes,
        }


def token_nats(net: Hymba, documents: list[list[int]], batch_tokens: int) -> Iterator[np.ndarray]:
    """Nats (n,) float64 of each document's tokens but its first, in order, at bounded memory.

    Documents of at most `batch_tokens` tokens are read several at a time, side by side; longer ones in pieces of as
    many that hand the state on.
    """
    net.eval()
    device = net.tok_emb.weight.device
    for group in _groups(documents, batch_tokens):
        if len(group) == 1:
            ids = torch.tensor(group[0], device=device)
            yield score_onward(net, ids, None, batch_tokens)[0].double().cpu().numpy()
            continue
        longest = max(map(len, group))
        if longest == 1:
            # The tokenizer makes nothing of these, as of line ends alone.
            yield from (np.empty(0) for _ in group)
            continue
        # Causal: what pads a row on the right changes nothing before it.
        ids_BT = torch.tensor([document + [0] * (longest - len(document)) for document in group], device=device)
        with torch.no_grad():
            nats_BT = net(ids_BT[:, :-1], ids_BT[:, 1:], reduction="none").double().cpu().numpy()
        for nats_T, document in zip(nats_BT, group, strict=True):
            yield nats_T[: len(document) - 1]


def score_texts(
    net: Hymba,
    processor: sentencepiece.SentencePieceProcessor,
    texts: Iterable[tuple[str, str]],
    batch_tokens: int = 8192,
) -> Iterator[DocumentScore]:
    """The scores of (name, text) pairs, in order. Texts without a byte are left out.

    Raises:
        ValueError: batch_tokens is none.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    encoder = TextEncoder(processor)
    waiting: list[tuple[str, int, list[int]]] = []

    def flush() -> Iterator[DocumentScore]:
        scored = token_nats(net, [ids for *_, ids in waiting], batch_tokens)
        for (name, n_bytes, ids), nats in zip(waiting, scored, strict=True):
            yield DocumentScore(name, Score(float(nats.sum()), len(ids) - 1, n_bytes))
        waiting.clear()

    for name, text in texts:
        if not text:
            continue
        waiting.append((name, len(text.encode()), encoder.encode_pieces(encoder.cut(text)).tolist()))
        if sum(len(ids) for *_, ids in waiting) > 4 * batch_tokens:
            yield from flush()
    yield from flush()


def read_texts(inputs: list[str], text_key: str = "text", separator: str | None = None) -> Iterator[tuple[str, str]]:
    """Documents of files and data sets, named FILE:NUMBER.

    Inputs are those of `hymba prepare`. Raises as it does for what cannot be read at all; a file or line that cannot
    is an error here, since a score of the rest would be another text's.
    """
    # Nothing is written, so no folder is left out for that.
    written = Path(os.devnull)
    files = find_inputs(inputs, EXCLUDED_FOLDERS, 0, written, Skips(strict=True, remedy=REMEDY))
    files.sort(key=lambda file: file.key)
    skips = Skips(strict=True, remedy=REMEDY)
    reader = DocumentReader(files, text_key, None if separator is None else unescaped(separator), skips)
    for document in reader:
        position = reader.position()
        yield f"{files[position['file']].path.name}:{position['document']}", document.text


def print_scores(scores: Iterable[DocumentScore], as_json: bool) -> Score:
    """A line for each document, then one for all; returns the sum. Raises ValueError where there is no document."""
    total, count, mean = Score(0.0, 0, 0), 0, 0.0
    for document in scores:
        total, count, mean = total + document.score, count + 1, mean + document.score.bpb
        if as_json:
            print(json.dumps(document.as_dict(), ensure_ascii=False), flush=True)
        else:
            print(f"{document.score.bpb:8.4f}  {document.score.n_bytes:>10,} bytes  {document.name}", flush=True)
    if not total.n_tokens:
        what = "the tokenizer makes no token of what the inputs hold" if count else "the inputs hold no text"
        raise ValueError(f"no document to score: {what}")
    if as_json:
        summary = DocumentScore("", total).as_dict() | {"documents": count, "mean_bits_per_byte": mean / count}
        print(json.dumps({key: value for key, value in summary.items() if key != "document"}), flush=True)
    else:
        print(
            f"{total.bpb:8.4f}  {total.n_bytes:>10,} bytes  all {count:,} documents "
            f"(mean of their own: {mean / count:.4f}; {total.n_tokens:,} tokens, {total.loss:.4f} nats each)"
        )
    return total


def _groups(documents: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Groups consecutive documents, so that a group padded to its longest has at most `batch_tokens` tokens."""
    group: list[list[int]] = []
    for document in documents:
        longest = max(map(len, [*group, document]))
        if group and longest * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group
