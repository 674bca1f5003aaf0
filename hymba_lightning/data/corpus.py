"""Documents → token shards: the tokenizer's sample, and parallel, interruptible encoding in constant memory."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hymba_lightning.data.documents import Document, DocumentReader, document_digest, split_rank
from hymba_lightning.data.manifest import SPLITS
from hymba_lightning.data.shard_writing import ShardWriter
from hymba_lightning.data.text_encoder import EncoderPool, TextEncoder, TextPiece
from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.files import write_atomic

# Characters per request to an encoder process, and requests in flight per process: memory stays constant.
TASK_CHARS = 500_000
TASKS_PER_WORKER = 3
SAMPLE_PIECE_CHARS = 2000

PROGRESS_FILE = "progress.json"
PROGRESS_VERSION = 2
SAVE_SECONDS = 30.0


@dataclass
class SplitTotals:
    """What one split holds."""

    writer: ShardWriter
    token_counts: np.ndarray
    documents: int = 0
    text_bytes: int = 0

    def state(self) -> dict[str, Any]:
        """Plain values to go on from."""
        return {
            "writer": self.writer.state(),
            "token_counts": self.token_counts.tolist(),
            "documents": self.documents,
            "text_bytes": self.text_bytes,
        }


@dataclass(frozen=True)
class Splitter:
    """Assigns documents to training or validation."""

    val_fraction: float
    """Share of the documents that is for validation."""
    seed: int
    """Of the draw."""
    held_out: frozenset[bytes] = frozenset()
    """Digests of the validation documents, where these are given; no equal one is for training."""

    def __call__(self, document: Document, rank: float) -> str | None:
        """
        Args:
            document: With a split of its own or without.
            rank: Its `split_rank`.

        Returns:
            The split, or None for a training document that is for validation too.
        """
        split = document.split or ("val" if rank < self.val_fraction else "train")
        return None if split == "train" and self.held_out and document_digest(document) in self.held_out else split


def read_progress(work: Path) -> dict[str, Any] | None:
    """What an interrupted `encode_documents` left in its folder to go on from, None where it left nothing."""
    try:
        progress = json.loads((work / PROGRESS_FILE).read_bytes())
        return progress if progress["version"] == PROGRESS_VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def can_go_on(work: Path, model: Path, progress: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether the folder still has the files that are needed to go on from the saved progress."""
    return model.is_file() and all(
        ShardWriter.holds(work, f"{arguments['name']}_{split}", arguments["shard_tokens"], state["writer"])
        for split, state in progress["splits"].items()
    )


def encode_documents(
    reader: DocumentReader,
    model: Path,
    work: Path,
    *,
    name: str,
    shard_tokens: int,
    splitter: Splitter,
    workers: int,
    report: Callable[[int], None],
    arguments: dict[str, Any],
    both_splits: bool = True,
) -> dict[str, SplitTotals]:
    """Read, encode in parallel and write, in the documents' order whatever the number of workers.

    Every SAVE_SECONDS the progress, with `arguments`, goes into the folder `work`. A later call that finds it there
    goes on from it, and the shards are those of an uninterrupted one. With `both_splits` a split without documents is
    an error.
    """
    processor = load_tokenizer(model)
    encoder = TextEncoder(processor)
    progress = read_progress(work) or {"splits": dict.fromkeys(SPLITS), "ranks": (1.0, 0.0), "left_out": 0}
    (lowest_rank, highest_rank), left_out = progress["ranks"], progress["left_out"]
    if "reader" in progress:
        reader.resume(progress["reader"])
    before = {split: state or {} for split, state in progress["splits"].items()}
    with (
        ShardWriter(work, f"{name}_train", shard_tokens, before["train"].get("writer")) as train,
        ShardWriter(work, f"{name}_val", shard_tokens, before["val"].get("writer")) as val,
        EncoderPool(model, workers) as pool,
    ):
        nothing = np.zeros(processor.get_piece_size(), dtype=np.int64)
        splits = {
            split: SplitTotals(
                writer,
                np.array(before[split].get("token_counts", nothing), dtype=np.int64),
                before[split].get("documents", 0),
                before[split].get("text_bytes", 0),
            )
            for split, writer in (("train", train), ("val", val))
        }
        waiting: dict[str, list[TextPiece]] = {split: [] for split in SPLITS}
        waiting_chars = dict.fromkeys(SPLITS, 0)
        in_flight: deque[tuple[str, Future[np.ndarray]]] = deque()

        def write_oldest() -> None:
            split, future = in_flight.popleft()
            tokens = future.result()
            splits[split].writer.append(tokens)
            splits[split].token_counts += np.bincount(tokens, minlength=processor.get_piece_size())

        def submit(split: str) -> None:
            in_flight.append((split, pool.submit(waiting[split])))
            waiting[split], waiting_chars[split] = [], 0
            while len(in_flight) > TASKS_PER_WORKER * workers:
                write_oldest()

        def flush() -> None:
            for split in SPLITS:
                if waiting[split]:
                    submit(split)
            while in_flight:
                write_oldest()

        saved_at = time.monotonic()
        for document in reader:
            rank = split_rank(document, splitter.seed)
            lowest_rank, highest_rank = min(lowest_rank, rank), max(highest_rank, rank)
            split = splitter(document, rank)
            if split is None:
                left_out += 1
                continue
            splits[split].documents += 1
            splits[split].text_bytes += len(document.utf8)
            for piece in encoder.cut(document.text):
                waiting[split].append(piece)
                waiting_chars[split] += len(piece.text)
                if waiting_chars[split] >= TASK_CHARS:
                    submit(split)
            report(reader.bytes_read)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                flush()
                state = {
                    "version": PROGRESS_VERSION,
                    "arguments": arguments,
                    "reader": reader.position(),
                    "ranks": (lowest_rank, highest_rank),
                    "left_out": left_out,
                    "splits": {split: totals.state() for split, totals in splits.items()},
                }
                write_atomic(work / PROGRESS_FILE, json.dumps(state))
                saved_at = time.monotonic()
        flush()
        report(reader.total_bytes)
    if left_out:
        reader.skips.note("training document that is for validation too, left out", "equal texts", left_out)
    if both_splits:
        _check_split(splits, lowest_rank, highest_rank, splitter.val_fraction, reader, left_out)
    return splits


def _check_split(
    splits: dict[str, SplitTotals],
    lowest_rank: float,
    highest_rank: float,
    val_fraction: float,
    reader: DocumentReader,
    left_out: int,
) -> None:
    n_documents = sum(split.documents for split in splits.values())
    if any(file.split for file in reader.files):
        for split, inputs in (("train", "inputs"), ("val", "validation inputs")):
            if splits[split].documents == 0:
                too = ", but those that are for validation too" if split == "train" and left_out else ""
                raise ValueError(f"the {inputs} hold no document that can be read{too}{unread(reader)}")
        return
    if n_documents < 2:
        raise ValueError(
            f"the inputs hold {n_documents} document{'s' * (n_documents != 1)} that can be read{unread(reader)}; "
            "training and validation need "
            "one each: give more files, cut a text file into documents with separator, or give val_inputs"
        )
    if splits["val"].documents == 0:
        raise ValueError(
            f"none of the {n_documents} documents fell to validation at val_fraction={val_fraction}; "
            f"raise it to {math.ceil(lowest_rank * 1e4 + 1) / 1e4} or more, or give more documents"
        )
    if splits["train"].documents == 0:
        raise ValueError(
            f"all {n_documents} documents fell to validation at val_fraction={val_fraction}; "
            f"lower it to {math.floor(highest_rank * 1e4) / 1e4} or less, or give more documents"
        )


def unread(reader: DocumentReader) -> str:
    """What was not read, in parentheses, for the message that too little was."""
    state = reader.skips.state()
    empty = [f"{kind}: {entry['first'][0]}" for kind, entry in state["notes"].items()]
    parts = [f"{state['count']:,} could not: {'; '.join(state['first'][:3])}"] if state["count"] else []
    return f" ({'; '.join(parts + empty)})" if parts or empty else ""


def tokenizer_sample(reader: DocumentReader, sample_bytes: int, splitter: Splitter) -> list[str]:
    """Up to `sample_bytes` of training text in pieces that SentencePiece takes."""
    sample: list[str] = []
    left = sample_bytes
    for document in reader:
        if splitter(document, split_rank(document, splitter.seed)) != "train":
            continue
        # A character has at least one byte: no more than `left` characters can be wanted.
        text = document.utf8[:left].decode("utf-8", errors="ignore") if len(document.utf8) > left else document.text
        sample += [text[start : start + SAMPLE_PIECE_CHARS] for start in range(0, len(text), SAMPLE_PIECE_CHARS)]
        left -= len(document.utf8)
        if left <= 0:
            break
    if not sample:
        raise ValueError(
            f"there is no training document to train a tokenizer on{unread(reader)}; give more documents, or lower "
            "val_fraction"
        )
    return sample
