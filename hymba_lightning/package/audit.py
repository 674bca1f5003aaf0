"""`hymba audit`: do the rules of the score hold for an artifact's evaluation, or for a submission's own code?"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import lzma
import os
import random
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.checkpoints import check_tokenizer
from hymba_lightning.closure import ARCHIVE, EVALUATE
from hymba_lightning.data.sequences import Chunk, TokenStream
from hymba_lightning.data.shards import find_shards, write_shard
from hymba_lightning.data.token_bytes import TokenBytes
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.evaluation.auditor import AuditReport, Evaluator, RuleBrokenError, audit
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.ttt import score_first_ttt
from hymba_lightning.package.digests import ARTIFACT, SETTINGS, DigestError, verify_folder
from hymba_lightning.package.submission import KEPT_VARIABLES, SubmissionError
from hymba_lightning.quantization import load_artifact
from hymba_lightning.text import printable
from hymba_lightning.units import bits_per_byte

SCORE_IS_SUM, AS_PACKAGED = "the score is the sum", "the folder is as packaged"
VAL_FILES = "*_val_*.bin"
# A submission has 16 MB and its logs; the sources are less than one.
MAX_FOLDER_BYTES, MAX_CODE_BYTES = 1 << 28, 1 << 24
# Of a worker's answer.
MAX_LINE_CHARS = 1 << 16
# Runs in a folder's copy: evaluates each data folder named on a line, as the folder's evaluate.py would.
WORKER = """
import json, sys
from pathlib import Path
folder, device = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(folder))
import numpy, torch
from hymba_lightning.package.referee import evaluate
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
    ttt: TTTConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Audits an artifact under `ttt`, or a submission's folder with its own code and settings.

    Args:
        path: Artifact, or folder that `hymba package` wrote.
        data_dir: Folder of token shards; a stretch of the validation tokens is drawn from it.
        tokenizer: SentencePiece model (default: tokenizer.model in data_dir).
        tokens: Tokens of the stream that is audited. Evaluations, as many as the vocabulary has ids for every position
            where probabilities are summed, take time in proportion.
        seq_len: Tokens of a forward pass (default: a twelfth of the stream, at most the settings').
        chunk_tokens: Tokens of a chunk (default: a quarter of the stream, so that there are several).
        past_positions: Positions from which on the stream is changed.
        distribution_positions: Positions where the probabilities of all ids are summed; 0 leaves that rule out.
        tolerance: Nats by which equal scores may differ; a GPU needs some, such as 1e-3.
        seed: Repeats an audit; null draws one.
        device: cpu, cuda, or auto.
        ttt: How an artifact is scored and adapts; a folder brings its own.
        progress: Called with evaluations done and in all.

    Raises:
        RuleBrokenError: naming the rule and where it is broken.
        ValueError, OSError: bad input.
    """
    source, data = Path(path), Path(data_dir)
    model = Path(tokenizer) if tokenizer else data / "tokenizer.model"
    token_bytes = TokenBytes.from_model(model)
    stream = TokenStream(find_shards(VAL_FILES, data), token_bytes.vocab_size)
    if not 16 <= tokens <= len(stream):
        raise ValueError(f"tokens={tokens} must be 16 to the {len(stream)} validation tokens of {data}")
    seed = secrets.randbits(32) if seed is None else seed
    first = random.Random(seed).randrange(len(stream) - tokens + 1)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    sizes = {"seq_len": seq_len or max(tokens // 12, 2), "chunk_tokens": chunk_tokens or -(-tokens // 4)}
    making = (
        _folder_evaluator(source, sizes, model, token_bytes, where)
        if source.is_dir()
        else _artifact_evaluator(source, sizes, model, token_bytes, where, ttt or TTTConfig())
    )
    with making as evaluate:
        report = audit(
            evaluate,
            stream[first : first + tokens],
            token_bytes.vocab_size,
            past_positions=past_positions,
            distribution_positions=distribution_positions,
            tolerance=tolerance,
            seed=seed,
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
def _artifact_evaluator(
    path: Path, sizes: dict[str, int], tokenizer: Path, token_bytes: TokenBytes, device: str, ttt: TTTConfig
) -> Iterator[Evaluator]:
    artifact = load_artifact(path)
    fingerprint = artifact.tokenizer.get("sha256")
    if fingerprint is not None:
        check_tokenizer(path, fingerprint, file_sha256(tokenizer), tokenizer, "--tokenizer")
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
        scored = score_first_ttt(copy.deepcopy(net), chunks, sizes["seq_len"], config, stream=tokens)
        return torch.cat([chunk.nats for chunk in scored])

    yield evaluate


@contextlib.contextmanager
def _folder_evaluator(
    source: Path, sizes: dict[str, int], tokenizer: Path, token_bytes: TokenBytes, device: str
) -> Iterator[Evaluator]:
    for name in (ARTIFACT, SETTINGS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} is no folder of `hymba package`: it lacks {name}")
    load_artifact(source / ARTIFACT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "submission"
        _copy(source, folder)
        _unpack(source / ARCHIVE, folder)
        settings = _settings(source)
        settings |= sizes | {"val_tokens_limit": None, "val_files": VAL_FILES}
        settings["ttt"] |= {"limit_seconds": None}
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ} | {"HOME": temporary}
        with (
            open(Path(temporary) / "errors", "w+b") as errors,
            subprocess.Popen(
                [sys.executable, "-I", "-c", WORKER, str(folder), device],
                cwd=temporary,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as worker,
        ):

            def evaluate(tokens: Tensor) -> Tensor:
                with _data_of(tokens, tokenizer) as data:
                    try:
                        print(data, file=worker.stdin, flush=True)
                        result = json.loads(worker.stdout.readline(MAX_LINE_CHARS))  # type: ignore[union-attr]
                        nats = torch.from_numpy(np.load(data / "nats.npy", allow_pickle=False))
                        result = {key: float(result[key]) for key in ("val_bpb", "tokens", "bytes")}
                    except (OSError, ValueError, KeyError, TypeError) as error:
                        errors.seek(0)
                        last = errors.read().decode(errors="replace").splitlines()[-15:]
                        raise SubmissionError(f"the code in {source} could not score:\n" + "\n".join(last)) from error
                _check_sum(result, tokens, nats, token_bytes)
                return nats

            try:
                yield evaluate
            finally:
                worker.kill()


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
