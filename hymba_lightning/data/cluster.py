"""`prepare` as tasks of datatrove, on the cores of one machine or on a SLURM cluster.

datatrove and not Ray Data: the work is one independent pass over each part of the files, without a shuffle or a
reduction that an object store would serve, and datatrove's task (rank, world size) is exactly that. It needs no running
service, submits the same tasks to SLURM arrays, and leaves a marker per finished task, so that what failed is run again
alone. A part is written by the functions that `prepare` uses, and goes on where it was when its task is started again.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hymba_lightning.claim import FolderClaim
from hymba_lightning.data.corpus import Splitter, SplitTotals, can_go_on, encode_documents, read_progress
from hymba_lightning.data.corpus import tokenizer_sample as sample_of
from hymba_lightning.data.documents import MAX_DOCUMENT_BYTES, DocumentReader, unescaped
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, InputFile, find_inputs
from hymba_lightning.data.manifest import (
    FORMAT,
    PARTS_FOLDER,
    SPLITS,
    VERSION,
    finish_install,
    install,
    read_manifest,
    sealed,
)
from hymba_lightning.data.prepare import describe, files_digest
from hymba_lightning.data.skips import Skips
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256, load_tokenizer, train_tokenizer
from hymba_lightning.files import write_atomic

PART_FILE, JOB_FILE = "part.json", "job.json"


@dataclass(frozen=True)
class ClusterPrepare:
    """What every task does. Callable as a step of a datatrove pipeline."""

    inputs: list[str]
    """As `prepare`'s, on a disk that all tasks see. Files are shared out whole."""
    out: str
    """Folder to write, on a disk that all tasks see."""
    name: str = "text"
    """Begin of the shards' names."""
    vocab_size: int = 1024
    """Pieces of the tokenizer that is trained, before the tasks start."""
    tokenizer: str | None = None
    """Existing SentencePiece model to use instead."""
    val_fraction: float = 0.05
    """Share of the documents that is for validation: by hash, so equal texts are on one side in all parts."""
    shard_tokens: int = 100_000_000
    """Tokens of a shard."""
    sample_bytes: int = 16_000_000
    """UTF-8 bytes of text that the tokenizer is trained on."""
    text_key: str = "text"
    """Field of a JSON line, or column, that holds the text."""
    separator: str | None = None
    """Cut text files into documents at this string, in which \\n and \\t are understood."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A line or row with a longer text is left out, a longer document of a text file is cut."""
    seed: int = 0
    """Of the split and of the order of the files."""

    @property
    def folder(self) -> Path:
        """The folder that the data set is written to."""
        return Path(self.out).expanduser().resolve()

    @property
    def parts(self) -> Path:
        """Where the tasks work."""
        return self.folder / PARTS_FOLDER

    @property
    def splitter(self) -> Splitter:
        """Which split a document belongs to."""
        return Splitter(self.val_fraction, self.seed)

    def files(self, skips: Skips | None = None) -> list[InputFile]:
        """All inputs, in the order that `prepare` reads them. Raises FileNotFoundError for one that matches nothing."""
        return find_inputs(self.inputs, EXCLUDED_FOLDERS, self.seed, self.folder, skips)

    def reader(self, files: list[InputFile]) -> DocumentReader:
        """A reader of the documents of `files`."""
        separator = None if self.separator is None else unescaped(self.separator)
        return DocumentReader(files, self.text_key, separator, max_bytes=self.max_document_bytes)

    def make_tokenizer(self) -> None:
        """Trains or copies the tokenizer that all tasks use, unless an earlier call has.

        Raises:
            FolderInUseError: another process is at work in the folder.
            FileExistsError: the folder holds the parts of another job.
        """
        with FolderClaim(self.folder, "preparation on a cluster"):
            self._make_tokenizer()

    def _make_tokenizer(self) -> None:
        model, job = self.parts / TOKENIZER_FILE, self.parts / JOB_FILE
        ours = json.loads(json.dumps(dataclasses.asdict(self)))
        if job.is_file() and json.loads(job.read_bytes()) != ours:
            raise FileExistsError(
                f"{self.parts} holds the parts of another job; finish that, remove them, or choose another folder"
            )
        if model.is_file() and job.is_file():
            return
        write_atomic(job, json.dumps(ours) + "\n")
        if self.tokenizer is not None:
            load_tokenizer(self.tokenizer)
            content = Path(self.tokenizer).expanduser().read_bytes()
        else:
            sample = sample_of(self.reader(self.files()), self.sample_bytes, self.splitter)
            content = train_tokenizer(sample, self.vocab_size)
        write_atomic(model, content)

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Task `rank` of `world_size`: encodes every world_size-th file into a folder of its own.

        Raises:
            FolderInUseError: the same task is running elsewhere.
        """
        with FolderClaim(self.parts / "claims" / f"{rank:05d}", f"task {rank} of a preparation on a cluster"):
            self._encode(rank, world_size)

    def _encode(self, rank: int, world_size: int) -> None:
        files, model = self.files()[rank::world_size], self.parts / TOKENIZER_FILE
        arguments: dict[str, Any] = {
            "files": files_digest(files),
            "tokenizer": file_sha256(model),
            "tasks": world_size,
            "name": f"{self.name}-{rank:05d}",
            "shard_tokens": self.shard_tokens,
        }
        work = self.parts / f"{rank:05d}"
        done = work / PART_FILE
        if done.is_file() and json.loads(done.read_bytes())["arguments"] == arguments:
            return
        earlier = read_progress(work)
        if earlier is None or earlier["arguments"] != arguments or not can_go_on(work, model, earlier, arguments):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        reader = self.reader(files)
        splits = encode_documents(
            reader,
            model,
            work,
            name=arguments["name"],
            shard_tokens=self.shard_tokens,
            splitter=self.splitter,
            workers=1,
            report=lambda _: None,
            arguments=arguments,
            both_splits=False,
        )
        part = {
            "arguments": arguments,
            "skipped": reader.skips.state(),
            "splits": {
                split: {
                    "documents": totals.documents,
                    "text_bytes": totals.text_bytes,
                    "tokens": totals.writer.n_tokens,
                    "token_counts": totals.token_counts.tolist(),
                    "files": [path.name for path in totals.writer.paths],
                }
                for split, totals in splits.items()
            },
        }
        write_atomic(done, json.dumps(part) + "\n")

    def merge(self, tasks: int) -> dict[str, Any]:
        """Moves the parts' shards together and writes the manifest, as `prepare` would; returns it.

        Raises:
            FileNotFoundError: a part is not finished.
            FolderInUseError: another process is at work in the folder.
            ValueError: a split has no document at all.
        """
        with FolderClaim(self.folder, "preparation on a cluster"):
            return self._merge(tasks)

    def _merge(self, tasks: int) -> dict[str, Any]:
        finish_install(self.folder)
        installed = read_manifest(self.folder)
        if installed is not None:
            shutil.rmtree(self.parts, ignore_errors=True)
            return installed
        folders = [self.parts / f"{rank:05d}" for rank in range(tasks)]
        missing = [folder.name for folder in folders if not (folder / PART_FILE).is_file()]
        if missing:
            raise FileNotFoundError(
                f"parts {', '.join(missing[:10])} of {tasks} are not finished: start the tasks again"
            )
        parts = [json.loads((folder / PART_FILE).read_bytes()) for folder in folders]
        splits = {}
        for split in SPLITS:
            rows = [part["splits"][split] for part in parts]
            paths = [folder / file for folder, row in zip(folders, rows, strict=True) for file in row["files"]]
            if not paths:
                raise ValueError(f"no document fell to the {split} split; change val_fraction or give more documents")
            writer: Any = SimpleNamespace(paths=paths, n_tokens=sum(row["tokens"] for row in rows))
            splits[split] = SplitTotals(
                writer,
                np.sum([row["token_counts"] for row in rows], axis=0),
                sum(row["documents"] for row in rows),
                sum(row["text_bytes"] for row in rows),
            )
        skips = Skips()
        self.files(skips)
        for part in parts:
            skips.merge(part["skipped"])
        described, digests = describe(
            splits, self.parts / TOKENIZER_FILE, "trained here" if self.tokenizer is None else "given"
        )
        manifest = sealed(
            {
                "format": FORMAT,
                "version": VERSION,
                "arguments": {**dataclasses.asdict(self), "tasks": tasks},
                "skipped": skips.state(),
                **described,
            }
        )
        install(
            self.parts,
            self.folder,
            self.name,
            manifest,
            digests,
            {
                path.name: f"{path.parent.name}/{path.name}"
                for totals in splits.values()
                for path in totals.writer.paths
            },
        )
        return manifest


def prepare_on_cluster(job: ClusterPrepare, tasks: int, workers: int, slurm: dict[str, Any] | None = None) -> None:
    """Trains the tokenizer here, then runs the tasks and the merge by datatrove.

    Args:
        job: What to do.
        tasks: Parts; no more than there are files are of use.
        workers: Tasks at a time.
        slurm: Options of datatrove's SlurmPipelineExecutor (time, partition, …), which submits both and returns at
            once; None runs them here.

    Raises:
        ImportError: datatrove is not installed.
        ValueError: tasks or workers below 1.
        FileExistsError: the folder holds prepared data, or the parts of another job.
        FolderInUseError: another process is at work in the folder.
    """
    if tasks < 1 or workers < 1:
        raise ValueError(f"tasks={tasks} and workers={workers} must be at least 1")
    try:
        executor = importlib.import_module("datatrove.executor")
    except ImportError as error:
        raise ImportError(f"preparing on a cluster needs datatrove ({error}): pip install datatrove") from error
    with FolderClaim(job.folder, "preparation on a cluster"), _isolated_children():
        finish_install(job.folder)
        if read_manifest(job.folder) is not None:
            raise FileExistsError(f"{job.folder} holds prepared data; choose another folder, or remove it")
        job._make_tokenizer()
        logs = str(job.parts / "logs")
        if slurm is None:
            executor.LocalPipelineExecutor([job], tasks=tasks, workers=workers, logging_dir=logs).run()
            job._merge(tasks)
            return
        encode = executor.SlurmPipelineExecutor([job], tasks=tasks, workers=workers, logging_dir=logs, **slurm)
        executor.SlurmPipelineExecutor(
            [_Merge(job, tasks)], tasks=1, depends=encode, logging_dir=f"{job.folder}/.merge-logs", **slurm
        ).run()


@contextlib.contextmanager
def _isolated_children() -> Iterator[None]:
    """Processes that are started meanwhile import nothing from the current directory."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@dataclass(frozen=True)
class _Merge:
    """The last step of a pipeline."""

    job: ClusterPrepare
    tasks: int

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        self.job.merge(self.tasks)
