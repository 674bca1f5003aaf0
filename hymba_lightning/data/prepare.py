"""Text → tokenizer → shards: `prepare` makes the folder that HymbaDataModule reads."""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hymba_lightning.data.corpus import PROGRESS_FILE, SplitTotals, encode_documents, read_progress, tokenizer_sample
from hymba_lightning.data.documents import EXCLUDED_FOLDERS, DocumentReader, InputFile, find_inputs
from hymba_lightning.data.manifest import FORMAT, SPLITS, VERSION, check_may_write, install, is_whole, read_manifest
from hymba_lightning.data.shards import HEADER_BYTES, MAX_VOCAB_SIZE, TOKEN_DTYPE, Shard
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256, load_tokenizer, train_tokenizer

NAMED_SKIPS = 10


@dataclass(frozen=True)
class PrepareSummary:
    """What a folder of prepared data holds, and what making it took."""

    out: Path
    manifest: dict[str, Any]
    seconds: float
    up_to_date: bool
    """The folder held exactly this already; nothing was done."""

    def __str__(self) -> str:
        lines = [f"{self.out} is up to date" if self.up_to_date else f"{self.out} written in {self.seconds:.1f} s"]
        for split in SPLITS:
            content = self.manifest["splits"][split]
            lines.append(
                f"  {split:5s} {content['documents']:>9,} documents  {content['text_bytes']:>14,} bytes  "
                f"{content['tokens']:>13,} tokens  {len(content['shards'])} shards"
            )
        tokenizer = self.manifest["tokenizer"]
        val = self.manifest["splits"]["val"]
        unigram_bpb = self.manifest["unigram_bpb"] or math.inf
        lines.append(
            f"  tokenizer: {tokenizer['vocab_size']:,} pieces ({tokenizer['origin']}), "
            f"{val['text_bytes'] / val['tokens']:.2f} bytes a token; "
            f"unigram model {unigram_bpb:.4f} bits per byte"
        )
        if val["counted_bytes"] != val["text_bytes"]:
            lines.append(
                f"  this tokenizer does not keep all of the text: bits per byte count {val['counted_bytes']:,} of "
                f"{val['text_bytes']:,} validation bytes"
            )
        skipped = self.manifest["skipped"]
        if skipped["count"]:
            lines.append(f"  skipped {skipped['count']:,}: " + "; ".join(skipped["first"]))
        return "\n".join(lines)


def prepare(
    inputs: list[str],
    out: str = "data",
    name: str = "text",
    vocab_size: int = 1024,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    sample_bytes: int = 16_000_000,
    character_coverage: float = 0.9995,
    text_key: str = "text",
    separator: str | None = None,
    exclude: tuple[str, ...] = EXCLUDED_FOLDERS,
    workers: int | None = None,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Turn text into a tokenizer, token shards and a manifest.

    Every document begins with BOS and belongs wholly to training or to validation, by a hash of its content. The
    folder is complete when it has a manifest.json. Doing it again with the same arguments and files does nothing, or
    goes on where an interrupted call was.

    Args:
        inputs: Files, folders (searched recursively) or glob patterns of .txt, .md, .rst, .py (a file is a document),
            .jsonl, .jsonl.gz, .jsonl.zst (a line is one) and .parquet (a row is one); hf:NAME[:SPLIT[:CONFIG]], a
            Hugging Face data set; "python_stdlib", the Python standard library's sources.
        out: Folder to write.
        name: Begin of the shards' names.
        vocab_size: Pieces of the tokenizer that is trained (on training documents only).
        tokenizer: Existing SentencePiece model to use instead.
        val_fraction: Share of the documents that is for validation.
        shard_tokens: Tokens of a shard.
        sample_bytes: UTF-8 bytes of text that the tokenizer is trained on.
        character_coverage: Share of the sample's characters that get pieces of their own; the rest become bytes.
        text_key: Field of a JSON line, or column, that holds the text.
        separator: Cut text files into documents at this string. By default a file is one document.
        exclude: Names or patterns of folders and files to leave out when a folder is searched.
        workers: Encoding processes. By default one per available core.
        seed: Of the split and of the order of the files.
        strict: Stop at a file or line that cannot be read, instead of skipping and counting it.
        overwrite: Replace a different dataset in `out`.
        progress: Show a progress bar.

    Returns:
        Counts, seconds, and the manifest.

    Raises:
        FileNotFoundError: An input or the tokenizer does not exist.
        FileExistsError: `out` holds something else.
        ImportError: A Parquet file or a Hugging Face data set, without the packages of the extra `data`.
        ValueError: An argument out of range, too little text for a tokenizer, or a split without documents.
    """
    started = time.monotonic()
    workers = _available_cores() if workers is None else workers
    _check_arguments(val_fraction, shard_tokens=shard_tokens, sample_bytes=sample_bytes, workers=workers)
    folder = Path(out).expanduser()
    files = find_inputs(inputs, exclude, seed, folder)
    given = Path(tokenizer).expanduser() if tokenizer else None
    if given is not None and (n_pieces := load_tokenizer(given).get_piece_size()) > MAX_VOCAB_SIZE:
        raise ValueError(f"{given} has {n_pieces:,} pieces; the shards' uint16 holds ids below {MAX_VOCAB_SIZE:,}")
    training = {"vocab_size": vocab_size, "sample_bytes": sample_bytes, "character_coverage": character_coverage}
    arguments = {
        "inputs": list(inputs),
        "files": files_digest(files),
        "name": name,
        "tokenizer": training if given is None else file_sha256(given),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "separator": separator,
        "exclude": list(exclude),
        "seed": seed,
    }
    existing = read_manifest(folder)
    if existing is not None and existing["arguments"] == arguments and is_whole(folder, existing):
        return PrepareSummary(folder, existing, time.monotonic() - started, up_to_date=True)
    check_may_write(folder, name, existing, arguments, overwrite)

    work = folder / ".partial"
    earlier = read_progress(work)
    if earlier is None or earlier["arguments"] != arguments:
        earlier = None
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    model = work / TOKENIZER_FILE
    reader = DocumentReader(files, text_key, separator, strict)
    try:
        with _progress_bar(progress) as bar:
            if given is not None:
                shutil.copyfile(given, model)
            elif earlier is None:
                task = bar.add_task("tokenizer", total=None)
                sample = tokenizer_sample(reader, sample_bytes, val_fraction, seed)
                trained = train_tokenizer(sample, vocab_size, character_coverage=character_coverage)
                model.write_bytes(trained)
                bar.update(task, total=1, completed=1)
            task = bar.add_task("encoding", total=reader.total_bytes or None)
            splits = encode_documents(
                reader,
                model,
                work,
                name=name,
                shard_tokens=shard_tokens,
                val_fraction=val_fraction,
                seed=seed,
                workers=workers,
                report=lambda bytes_read: bar.update(task, completed=bytes_read),
                arguments=arguments,
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "arguments": arguments,
            "skipped": {"count": len(reader.skipped), "first": reader.skipped[:NAMED_SKIPS]},
            **describe(splits, model, "trained here" if given is None else "given"),
        }
        # From here on the shards leave the folder that the progress speaks of.
        (work / PROGRESS_FILE).unlink(missing_ok=True)
        install(work, folder, name, existing, manifest)
    except BaseException:
        # Progress that was saved is kept for the same call to go on from.
        if read_progress(work) is None:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return PrepareSummary(folder, manifest, time.monotonic() - started, up_to_date=False)


def describe(splits: dict[str, SplitTotals], model: Path, origin: str) -> dict[str, Any]:
    """The manifest's account of the tokenizer, the splits, and the unigram model's bits per byte."""
    token_bytes = TokenBytes.from_model(model)
    token_counts = splits["train"].token_counts
    nats_of = np.log(token_counts.sum() + token_counts.size) - np.log(token_counts + 1)
    val_nats, counted_bytes = 0.0, 0
    for previous, targets in _target_pairs(splits["val"].writer.paths):
        val_nats += float(nats_of[targets].sum())
        counted_bytes += int(token_bytes.count(previous, targets).sum(dtype=np.int64))
    described: dict[str, Any] = {
        "tokenizer": {
            "file": TOKENIZER_FILE,
            "sha256": file_sha256(model),
            "vocab_size": token_bytes.vocab_size,
            "origin": origin,
        },
        "unigram_bpb": val_nats / (math.log(2) * counted_bytes) if counted_bytes else None,
        "splits": {
            split: {
                "documents": totals.documents,
                "text_bytes": totals.text_bytes,
                "tokens": totals.writer.n_tokens,
                "shards": [_describe_shard(path) for path in totals.writer.paths],
            }
            for split, totals in splits.items()
        },
    }
    described["splits"]["val"]["counted_bytes"] = counted_bytes
    # Last, because it is long.
    described["train_token_counts"] = token_counts.tolist()
    return described


def _describe_shard(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    n_tokens = (size - HEADER_BYTES) // TOKEN_DTYPE.itemsize
    return {"file": path.name, "bytes": size, "tokens": n_tokens, "sha256": file_sha256(path)}


def _target_pairs(paths: list[Path], block: int = 1 << 22) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(previous, target) ids of the shards' tokens in blocks: all but the very first token are targets."""
    last = np.empty(0, dtype=np.int64)
    for path in paths:
        shard = Shard(path)
        for start in range(0, shard.n_tokens, block):
            tokens = np.concatenate([last, shard.read(start, min(start + block, shard.n_tokens))])
            yield tokens[:-1], tokens[1:]
            last = tokens[-1:]


def _progress_bar(enabled: bool) -> Progress:
    eta = (TextColumn("ETA"), TimeRemainingColumn())
    percent = TextColumn("{task.percentage:3.0f}%")
    return Progress(
        TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn(), *eta, disable=not enabled
    )


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_arguments(val_fraction: float, **counts: int) -> None:
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1, both excluded")
    for field, value in counts.items():
        if value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1")


def files_digest(files: list[InputFile]) -> str:
    """Changes when an input file appears, vanishes or is modified."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
