"""`hymba audit`: do the rules of the score hold for an artifact's evaluation, or for a submission's own code?"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import lzma
import math
import os
import queue
import random
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.closure import ARCHIVE, EVALUATE
from hymba_lightning.cores import available_cores
from hymba_lightning.data.manifest import check_manifest
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.shards import find_shards
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.token_stream import TokenStream
from hymba_lightning.device import device_of
from hymba_lightning.evaluation.auditor import AuditReport, Evaluator, Probe, RuleBrokenError, audit
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.package.audit_artifact import artifact_evaluator
from hymba_lightning.package.digests import ARTIFACT, SETTINGS, DigestError, verify_folder
from hymba_lightning.package.submission import KEPT_VARIABLES, SubmissionError
from hymba_lightning.text import printable
from hymba_lightning.units import bits_per_byte

SCORE_IS_SUM, AS_PACKAGED = "the score is the sum", "the folder is as packaged"
VAL_FILES = "*_val_*.bin"
# A submission has 16 MB and its logs; the sources are less than one.
MAX_FOLDER_BYTES, MAX_CODE_BYTES = 1 << 28, 1 << 24
# Of a worker's answer.
MAX_LINE_BYTES = 1 << 16
# How long a worker may take to answer: the first time it imports and may compile.
MIN_ANSWER_SECONDS, START_SECONDS, TIMES_SCORING = 60.0, 240.0, 100.0
# Evaluations for which several processes are worth their start, and how many processes at most.
MANY, MOST_JOBS = 200, 8
# Runs in a folder's copy: evaluates each data folder named on a line, as the folder's evaluate.py would.
WORKER = """
import json, sys
from pathlib import Path
folder, device, jobs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.path.insert(0, str(folder))
import numpy, torch
from hymba_lightning.package.referee import evaluate
if jobs > 1:
    torch.set_num_threads(1)
answer = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    data = Path(line.rstrip("\\n"))
    result = evaluate(folder, data, data / "tokenizer.model", torch.device(device))
    numpy.save(data / "nats.npy", result["nats"].numpy())
    answer.write(json.dumps({key: result[key] for key in ("val_bpb", "tokens", "bytes")}) + "\\n")
    answer.flush()
"""


def audit_path(
    path: str,
    data_dir: str,
    tokenizer: str | None = None,
    tokens: int = 257,
    seq_len: int | None = None,
    chunk_tokens: int | None = None,
    past_positions: int = 24,
    distribution_positions: int = 1,
    tolerance: float = 0.0,
    seed: int | None = None,
    device: str = "auto",
    answer_seconds: float | None = None,
    jobs: int | None = None,
    ttt: TTTConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Audits an artifact under `ttt`, or a submission's folder with its own code and settings.

    Args:
        path: Artifact, or folder that `hymba package` wrote.
        data_dir: Folder of token shards; a stretch of the validation tokens is drawn from it.
        tokenizer: SentencePiece model (default: tokenizer.model in data_dir).
        tokens: Tokens of the stream that is audited. Evaluations take time in proportion: a folder's are as many as the
            vocabulary has ids for the last token and for every position drawn where probabilities are summed.
        seq_len: Tokens of a forward pass (default: a fourteenth of the stream).
        chunk_tokens: Tokens of a chunk (default: about a quarter of the stream, so that there are several, in whole
            forward passes where they are shorter; the last one has a rest).
        past_positions: Positions from which on the stream is changed.
        distribution_positions: Positions drawn where the probabilities of all ids are summed, as they are at the last
            token besides; 0 leaves that rule out.
        tolerance: Nats by which equal scores may differ; a GPU needs some, such as 1e-3.
        seed: Repeats an audit; null draws one.
        device: cpu, cuda, or auto.
        answer_seconds: How long a folder's code may take for one evaluation (default: a hundred times what scoring the
            stream without adaptation takes here, at least 60 s; the first time 240 s more, to import and compile).
        jobs: Processes that evaluate at a time (default: one for each core where there are many evaluations to make, at
            most 8; one on a GPU).
        ttt: How an artifact is scored and adapts; a folder brings its own.
        progress: Called with evaluations done and in all.

    Raises:
        RuleBrokenError: naming the rule and where it is broken.
        ValueError, OSError: bad input.
    """
    source, data = Path(path), Path(data_dir)
    if not data.is_dir():
        raise FileNotFoundError(f"--data_dir {data} is no folder: give one that `hymba prepare` wrote")
    model = Path(tokenizer) if tokenizer else data / "tokenizer.model"
    token_bytes = TokenBytes.from_model(model)
    shards = find_shards(VAL_FILES, data)
    check_manifest(data, shards, model)
    stream = TokenStream(shards, token_bytes.vocab_size)
    if not 16 <= tokens <= len(stream):
        raise ValueError(f"tokens={tokens} must be 16 to the {len(stream)} validation tokens of {data}")
    if answer_seconds is not None and not 0 < answer_seconds < math.inf:
        raise ValueError(f"answer_seconds={answer_seconds} must be a number of seconds above 0")
    seed = secrets.randbits(32) if seed is None else seed
    first = random.Random(seed).randrange(len(stream) - tokens + 1)
    where = str(device_of(device))
    length, quarter = seq_len or max(tokens // 14, 2), -(-tokens // 4)
    # Whole passes: a short one in every chunk would nearly double the number of forward passes.
    chunk = chunk_tokens or (-(-quarter // length) * length if length < quarter else quarter)
    sizes = {"seq_len": length, "chunk_tokens": chunk}
    if jobs is None:
        many = past_positions + (distribution_positions and distribution_positions + 1) * token_bytes.vocab_size
        jobs = min(available_cores(), MOST_JOBS) if where == "cpu" and many >= MANY else 1
    elif jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    true = stream[first : first + tokens]
    making = (
        _folder_evaluator(source, sizes, model, token_bytes, where, true, answer_seconds, jobs)
        if source.is_dir()
        else artifact_evaluator(source, sizes, model, where, ttt or TTTConfig(), jobs)
    )
    with making as (evaluate, probe):
        report = audit(
            evaluate,
            true,
            token_bytes.vocab_size,
            past_positions=past_positions,
            distribution_positions=distribution_positions,
            tolerance=tolerance,
            seed=seed,
            jobs=jobs,
            probe=probe,
            progress=progress,
        )
    if source.is_dir():
        # Last, since a rule that its code breaks says more than that the code was changed.
        _check_as_packaged(source)
        report = dataclasses.replace(report, also=(SCORE_IS_SUM, AS_PACKAGED))
    return report


def _check_as_packaged(folder: Path) -> None:
    try:
        verify_folder(folder)
    except DigestError as error:
        raise RuleBrokenError(AS_PACKAGED, str(error)) from error
    if (folder / "evaluate.py").read_bytes() != EVALUATE.encode():
        raise RuleBrokenError(
            AS_PACKAGED,
            f"evaluate.py in {folder} is not the one that this version's `hymba package` writes: what it does with the "
            f"code in {ARCHIVE}, which was tried, is not known",
        )


@contextlib.contextmanager
def _folder_evaluator(
    source: Path,
    sizes: dict[str, int],
    tokenizer: Path,
    token_bytes: TokenBytes,
    device: str,
    true: Tensor,
    answer_seconds: float | None,
    jobs: int,
) -> Iterator[tuple[Evaluator, Probe | None]]:
    for name in (ARTIFACT, SETTINGS):
        if not (source / name).is_file():
            near = f" (did you mean {source / ARTIFACT}?)" if name != ARTIFACT else ""
            raise FileNotFoundError(f"{source} is no folder of `hymba package`: it lacks {name}{near}")
    # The artifact is looked at even where nothing is timed.
    with artifact_evaluator(source / ARTIFACT, sizes, tokenizer, device, TTTConfig(epochs=0)) as (score, _):
        if answer_seconds is None:
            started = time.monotonic()
            score(true)
            limit = max(MIN_ANSWER_SECONDS, TIMES_SCORING * (time.monotonic() - started))
            first_limit = limit + START_SECONDS
        else:
            limit = first_limit = answer_seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "submission"
        _copy(source, folder)
        _unpack(source / ARCHIVE, folder)
        settings = _settings(source)
        settings |= sizes | {"val_tokens_limit": None, "val_files": VAL_FILES}
        settings["ttt"] |= {"limit_seconds": None}
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ} | {"HOME": temporary}
        workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        with contextlib.ExitStack() as all_of_them:
            for index in range(jobs):
                errors = all_of_them.enter_context(open(Path(temporary) / f"errors.{index}", "w+b"))
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", WORKER, str(folder), device, str(jobs)],
                    cwd=temporary,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                )
                all_of_them.enter_context(process)
                all_of_them.callback(_end, process)
                limits = itertools.chain([first_limit], itertools.repeat(limit))
                workers.put(_Worker(process, errors, limits))

            def evaluate(tokens: Tensor) -> Tensor:
                worker = workers.get()
                try:
                    result, nats = _ask(worker, tokens, tokenizer, source)
                finally:
                    workers.put(worker)
                _check_sum(result, tokens, nats, token_bytes)
                return nats

            # A folder's own code is asked for whole streams alone: it is what is not trusted.
            yield evaluate, None


class _Worker(NamedTuple):
    """A process that runs a folder's code."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    limits: Iterator[float]
    """Seconds for each of its answers."""


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its children too, if it has not yet been waited for.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # What it did not read any more is still to be written.
    with contextlib.suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]


def _ask(worker: _Worker, tokens: Tensor, tokenizer: Path, source: Path) -> tuple[dict[str, float], Tensor]:
    """A worker's sums and nats for a stream. Raises SubmissionError where it has none to give."""
    seconds, process = next(worker.limits), worker.process
    assert process.stdin is not None
    assert process.stdout is not None
    with _data_of(tokens, tokenizer) as data:
        try:
            process.stdin.write(f"{data}\n".encode())
            process.stdin.flush()
            result = json.loads(_read_line(process.stdout, seconds))
            nats = _read_nats(data / "nats.npy", tokens.numel())
            return {key: float(result[key]) for key in ("val_bpb", "tokens", "bytes")}, nats
        except TimeoutError as error:
            raise SubmissionError(
                f"the code in {source} gave no answer for a stream of {tokens.numel()} tokens within "
                f"{seconds:.0f} s: give it longer with --answer_seconds, if it is only slow"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            worker.errors.seek(0)
            last = worker.errors.read().decode(errors="replace").splitlines()[-15:]
            raise SubmissionError(f"the code in {source} could not score:\n" + "\n".join(last)) from error


def _read_line(pipe: IO[bytes], seconds: float) -> bytes:
    """A worker's next line, or what there is of it where it has ended. Raises TimeoutError."""
    line, ends = bytearray(), time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        if not select.select([pipe], [], [], max(ends - time.monotonic(), 0.0))[0]:
            raise TimeoutError
        # The descriptor alone: a buffer may hold what `select` does not see.
        given = os.read(pipe.fileno(), 1)
        if not given:
            break
        line += given
    return bytes(line)


def _read_nats(path: Path, n_tokens: int) -> Tensor:
    """A worker's scores. Raises ValueError where the file is none that it should have written."""
    about = path.lstat()
    # A pipe would never end, a sparse file fill the memory.
    if not stat.S_ISREG(about.st_mode) or about.st_size > 4096 + 8 * n_tokens:
        raise ValueError("nats.npy is no file of as many numbers as the stream has tokens")
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _copy(source: Path, folder: Path) -> None:
    """The folder's files, without what links lead to, pipes and devices."""
    paths = [path for path in source.rglob("*") if path.is_file() and not path.is_symlink()]
    n_bytes = sum(path.stat().st_size for path in paths)
    if n_bytes > MAX_FOLDER_BYTES:
        raise SubmissionError(f"{source} holds {n_bytes:,} bytes, which no submission needs: it is not copied")
    for path in paths:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _unpack(archive: Path, folder: Path) -> None:
    """Sources of this package alone, of a bounded size: a module of another name could take another library's place."""
    left = MAX_CODE_BYTES
    try:
        with tarfile.open(archive) as code:
            for member in code:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.parts[:1] != ("hymba_lightning",) or name.suffix != ".py":
                    raise SubmissionError(
                        f"{archive} holds {printable(member.name, 100)}, and `hymba package` packs modules of "
                        "hymba_lightning only: package again"
                    )
                left -= member.size
                if left < 0:
                    raise SubmissionError(f"{archive} unpacks to more than {MAX_CODE_BYTES:,} bytes: package again")
                code.extract(member, folder, filter="data")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise SubmissionError(f"{archive} cannot be unpacked ({error}): package again") from error


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except (ValueError, RecursionError) as error:
        raise SubmissionError(f"{folder / SETTINGS} is damaged ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("ttt"), dict):
        raise SubmissionError(f"{folder / SETTINGS} does not say how the network adapts")
    return settings


def _check_sum(result: dict[str, Any], tokens: Tensor, nats: Tensor, token_bytes: TokenBytes) -> None:
    """The score that is reported is that of the tokens' scores and of the true bytes."""
    n_bytes = int(token_bytes.count(tokens[:-1].numpy(), tokens[1:].numpy()).sum())
    bpb = bits_per_byte(float(nats.double().sum()), n_bytes)
    if result["tokens"] != tokens.numel() - 1 or result["bytes"] != n_bytes:
        raise RuleBrokenError(
            SCORE_IS_SUM,
            f"it reports {result['tokens']:.0f} tokens of {result['bytes']:.0f} bytes, and "
            f"there were {tokens.numel() - 1} of {n_bytes}",
        )
    if not abs(result["val_bpb"] - bpb) <= 1e-5 * abs(bpb):
        raise RuleBrokenError(
            SCORE_IS_SUM, f"it reports {result['val_bpb']} bits per byte, and the tokens' scores make {bpb}"
        )


@contextlib.contextmanager
def _data_of(tokens: Tensor, tokenizer: Path) -> Iterator[Path]:
    """A folder as a referee's: from nothing in it can the code find the true stream, whose future it could look up."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(tokenizer, Path(folder) / "tokenizer.model")
        write_shard(Path(folder) / "text_val_000000.bin", tokens.numpy().astype(np.uint16))
        yield Path(folder)
