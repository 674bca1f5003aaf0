"""Text → tokenizer → shards: `prepare` makes the folder that HymbaDataModule reads."""

import hashlib
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hymba_lightning.claim import FolderClaim
from hymba_lightning.cores import available_cores
from hymba_lightning.data.corpus import (
    Splitter,
    SplitTotals,
    can_go_on,
    encode_documents,
    read_progress,
    tokenizer_sample,
)
from hymba_lightning.data.digests import FileDigest, hash_files
from hymba_lightning.data.documents import MAX_DOCUMENT_BYTES, DocumentReader, document_digest, unescaped
from hymba_lightning.data.inputs import (
    EXCLUDED_FOLDERS,
    TEXT_SUFFIXES,
    InputFile,
    apart,
    find_inputs,
    head_and_tail,
)
from hymba_lightning.data.manifest import (
    FORMAT,
    JOURNAL_FILE,
    PARTS_FOLDER,
    SPLITS,
    VERSION,
    WORK_FOLDER,
    check_may_write,
    finish_install,
    first_damage,
    install,
    read_manifest,
    sealed,
)
from hymba_lightning.data.shard_writing import MAX_SHARD_TOKENS
from hymba_lightning.data.shards import HEADER_BYTES, TOKEN_DTYPE, Shard
from hymba_lightning.data.skips import Skips, skip_lines
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256, load_tokenizer, train_tokenizer
from hymba_lightning.files import write_atomic
from hymba_lightning.units import bits_per_byte


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
        return "\n".join(lines + skip_lines(self.manifest["skipped"]))


def prepare(
    inputs: list[str],
    out: str = "data",
    name: str = "text",
    vocab_size: int = 1024,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    val_inputs: list[str] | None = None,
    shard_tokens: int = 100_000_000,
    sample_bytes: int = 16_000_000,
    character_coverage: float = 0.9995,
    text_key: str = "text",
    separator: str | None = None,
    exclude: tuple[str, ...] = EXCLUDED_FOLDERS,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    workers: int | None = None,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Turn text into a tokenizer, token shards and a manifest.

    Every document begins with BOS and belongs wholly to training or to validation, by a hash of its content; of one
    single text file the end is for validation. The folder is complete when it has a manifest.json; one process at a
    time writes to it. Doing it again with the same arguments and files does nothing, or goes on where an interrupted
    call was.

    Args:
        inputs: Files, folders (searched recursively) or glob patterns of .txt, .md, .rst, .py (a file is a document),
            .jsonl, .jsonl.gz, .jsonl.zst (a line is one), .csv, .tsv and .parquet (a row is one);
            hf:NAME[:SPLIT[:CONFIG]], a Hugging Face data set; "python_stdlib", the Python standard library's sources.
        out: Folder to write.
        name: Begin of the shards' names.
        vocab_size: Pieces of the tokenizer that is trained (on training documents only).
        tokenizer: Existing SentencePiece model to use instead.
        val_fraction: Share of the documents that is for validation.
        val_inputs: Files, folders or patterns of the validation documents; all of `inputs` is for training then,
            except documents that are among these too.
        shard_tokens: Tokens of a shard.
        sample_bytes: UTF-8 bytes of text that the tokenizer is trained on.
        character_coverage: Share of the sample's characters that get pieces of their own; the rest become bytes.
        text_key: Field of a JSON line, or column, that holds the text.
        separator: Cut text files into documents at this string, in which \\n, \\t and \\\\ are understood. By default a
            file is one document.
        exclude: Names or patterns of folders and files to leave out when a folder is searched.
        max_document_bytes: A line or row with a longer text is left out, a longer document of a text file is cut.
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
        FolderInUseError: Another process is writing to `out`.
        ImportError: A Parquet file or a Hugging Face data set, without the packages of the extra `data`.
        ValueError: An argument out of range, too little text for a tokenizer, a split without documents, or a file for
            both training and validation.
    """
    started = time.monotonic()
    workers = available_cores() if workers is None else workers
    _check_arguments(
        name,
        val_fraction,
        separator,
        seed,
        character_coverage,
        shard_tokens=shard_tokens,
        sample_bytes=sample_bytes,
        workers=workers,
        max_document_bytes=max_document_bytes,
    )
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out={folder} is a file; name a folder")
    skips = Skips(strict)
    files = find_inputs(inputs, exclude, seed, folder, skips)
    if val_inputs is not None:
        files = apart(files, find_inputs(val_inputs, exclude, seed, folder, skips))
    elif len(files) == 1 and files[0].is_of(TEXT_SUFFIXES) and separator is None:
        files = head_and_tail(files[0], val_fraction)
    given = Path(tokenizer).expanduser() if tokenizer else None
    if given is not None:
        load_tokenizer(given)
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
    if val_inputs is not None:
        arguments["val_inputs"] = list(val_inputs)
    if max_document_bytes != MAX_DOCUMENT_BYTES:
        arguments["max_document_bytes"] = max_document_bytes
    reader = DocumentReader(
        files, text_key, None if separator is None else unescaped(separator), skips, max_document_bytes
    )
    claim = FolderClaim(folder, "hymba prepare")
    try:
        claim.take()
    except PermissionError:
        # What nobody can write to may still be what is wanted.
        existing = read_manifest(folder)
        if existing is None or existing["arguments"] != arguments or first_damage(folder, existing):
            raise
        return PrepareSummary(folder, existing, time.monotonic() - started, up_to_date=True)
    try:
        existing = _existing(folder, overwrite)
        if existing is not None and existing["arguments"] == arguments and not first_damage(folder, existing):
            return PrepareSummary(folder, existing, time.monotonic() - started, up_to_date=True)
        check_may_write(folder, name, existing, arguments, overwrite)
        manifest = _make(folder, reader, arguments, given, workers, progress)
    finally:
        claim.release()
    return PrepareSummary(folder, manifest, time.monotonic() - started, up_to_date=False)


def _existing(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of what the folder holds, after what an earlier call had decided is done."""
    if (folder / PARTS_FOLDER).exists():
        raise FileExistsError(
            f"out={folder} holds the parts of a preparation on a cluster; finish that, remove "
            f"{folder / PARTS_FOLDER}, or choose another folder"
        )
    try:
        finish_install(folder)
        return read_manifest(folder)
    except ValueError:
        if not overwrite:
            raise
        (folder / JOURNAL_FILE).unlink(missing_ok=True)
        return None


def _make(
    folder: Path, reader: DocumentReader, arguments: dict[str, Any], given: Path | None, workers: int, progress: bool
) -> dict[str, Any]:
    """Encode everything in a folder inside `folder`, then install it; returns the manifest."""
    work = folder / WORK_FOLDER
    model = work / TOKENIZER_FILE
    earlier = read_progress(work)
    if earlier is None or earlier["arguments"] != arguments or not can_go_on(work, model, earlier, arguments):
        earlier = None
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    try:
        with _progress_bar(progress) as bar:
            held_out = [file for file in reader.files if file.split == "val"] if "val_inputs" in arguments else []
            splitter = Splitter(
                arguments["val_fraction"],
                arguments["seed"],
                frozenset(document_digest(document) for document in reader.of(held_out)),
            )
            if given is not None:
                write_atomic(model, given.read_bytes())
            elif earlier is None:
                task = bar.add_task("tokenizer", total=None)
                training = arguments["tokenizer"]
                sample = tokenizer_sample(reader, training["sample_bytes"], splitter)
                trained = train_tokenizer(
                    sample, training["vocab_size"], character_coverage=training["character_coverage"]
                )
                write_atomic(model, trained)
                bar.update(task, total=1, completed=1)
            task = bar.add_task("encoding", total=reader.total_bytes or None)
            splits = encode_documents(
                reader,
                model,
                work,
                name=arguments["name"],
                shard_tokens=arguments["shard_tokens"],
                splitter=splitter,
                workers=workers,
                report=lambda bytes_read: bar.update(task, completed=bytes_read),
                arguments=arguments,
            )
        described, digests = describe(splits, model, "trained here" if given is None else "given")
        manifest = sealed(
            {"format": FORMAT, "version": VERSION, "arguments": arguments, "skipped": reader.skips.state(), **described}
        )
        install(work, folder, arguments["name"], manifest, digests)
    except BaseException:
        # Progress that was saved is kept for the same call to go on from, and so is what is being installed.
        if read_progress(work) is None and not (folder / JOURNAL_FILE).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def describe(splits: dict[str, SplitTotals], model: Path, origin: str) -> tuple[dict[str, Any], dict[str, FileDigest]]:
    """The manifest's account of tokenizer, splits and the unigram model's bits per byte; the shards' digests."""
    digests = {
        path.name: digest
        for path, digest in hash_files([path for totals in splits.values() for path in totals.writer.paths]).items()
    }
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
        "unigram_bpb": bits_per_byte(val_nats, counted_bytes) if counted_bytes else None,
        "splits": {
            split: {
                "documents": totals.documents,
                "text_bytes": totals.text_bytes,
                "tokens": totals.writer.n_tokens,
                "shards": [_describe_shard(path, digests[path.name].sha256) for path in totals.writer.paths],
            }
            for split, totals in splits.items()
        },
    }
    described["splits"]["val"]["counted_bytes"] = counted_bytes
    # Last, because it is long.
    described["train_token_counts"] = token_counts.tolist()
    return described, digests


def _describe_shard(path: Path, sha256: str) -> dict[str, Any]:
    size = path.stat().st_size
    n_tokens = (size - HEADER_BYTES) // TOKEN_DTYPE.itemsize
    return {"file": path.name, "bytes": size, "tokens": n_tokens, "sha256": sha256}


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


def _check_arguments(
    name: str, val_fraction: float, separator: str | None, seed: int, character_coverage: float, **counts: int
) -> None:
    if not re.fullmatch(r"(?!\.)[^/\\]+", name) or not name.isprintable() or re.search("_(train|val)_", f"{name}_"):
        raise ValueError(f"name is {name!r}; it must begin file names, and not look like a split's")
    if separator == "":
        raise ValueError("separator is empty; give the text that ends a document, such as \\n\\n")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character_coverage is {character_coverage}; it must lie above 0 and be at most 1")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError("seed is over 64 bits; give a smaller one")
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction is {val_fraction}; it must lie between 0 and 1, both excluded: for validation "
            "texts of their own give val_inputs"
        )
    for field, value in counts.items():
        if value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1")
    if counts["shard_tokens"] > MAX_SHARD_TOKENS:
        raise ValueError(f"shard_tokens is {counts['shard_tokens']:,}; a shard's header counts to {MAX_SHARD_TOKENS:,}")


def files_digest(files: list[InputFile]) -> str:
    """Changes when an input file appears, vanishes or is modified."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
