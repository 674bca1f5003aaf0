"""What a submission's folder says that it holds, and whether it does. The standard library only: it runs first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARTIFACT, SETTINGS, RESULT = "artifact.hymba", "settings.json", "result.json"
DIGESTS, SUBMISSION = "digests.json", "submission.json"
# What a folder may hold besides what is in digests.json: texts for people, and evaluate.py's own word.
WITHOUT_DIGEST = (DIGESTS, SUBMISSION, RESULT, "README.md")


class DigestError(ValueError):
    """Something in the folder, or the data, is not what the submission says."""


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path, code: Sequence[Path], logs: Sequence[Path], data: dict[str, Any]) -> dict[str, Any]:
    """Content of digests.json.

    Args:
        folder: Holds artifact, settings, code and logs.
        code: Its files of code, relative to it.
        logs: Its records of the training and the test, likewise.
        data: Of the validation data: its digest, the tokenizer's, and the tokens and bytes that are scored.
    """
    return {
        "artifact": sha256(folder / ARTIFACT),
        "settings": sha256(folder / SETTINGS),
        "data": data,
        "code": {file.as_posix(): sha256(folder / file) for file in sorted(code)},
        "logs": {file.as_posix(): sha256(folder / file) for file in sorted(logs)},
    }


def shorten(digests: dict[str, Any]) -> dict[str, str]:
    """The digests one by one, all of the code's as one, and of the logs: what submission.json and the README show."""

    def of_all(files: dict[str, str]) -> str:
        lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    return {
        "code": of_all(digests["code"]),
        "logs": of_all(digests["logs"]),
        "settings": digests["settings"],
        "artifact": digests["artifact"],
        "data": digests["data"]["digest"],
        "tokenizer": digests["data"]["tokenizer"],
    }


def verify_folder(folder: Path) -> dict[str, Any]:
    """Compares code, settings, artifact and logs with digests.json, and that and the bytes with submission.json.

    Returns:
        digests.json.

    Raises:
        DigestError: naming what differs, is missing, or is there besides.
    """
    digests = _read(folder / DIGESTS)
    try:
        told = shorten(digests)
        files = {ARTIFACT: digests["artifact"], SETTINGS: digests["settings"], **digests["code"], **digests["logs"]}
        about = _read(folder / SUBMISSION)
        submitted, n_bytes = about["digests"], about["bytes_total"]
        digests["data"]["tokens"], digests["data"]["bytes"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DigestError(f"{DIGESTS} or {SUBMISSION} in {folder} is damaged: it lacks {error}") from error
    for name, digest in told.items():
        if submitted.get(name) != digest:
            raise DigestError(f"{SUBMISSION} and {DIGESTS} in {folder} have other digests of the {name}")
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise DigestError(f"{name} is missing in {folder}")
        if sha256(folder / name) != digest:
            raise DigestError(f"{name} in {folder} is not what was packaged: its SHA-256 is not the recorded one")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise DigestError(
                f"{name} in {folder} is a link, behind which may be code: a submission holds its files itself"
            )
        if not path.is_dir() and name not in files and name not in WITHOUT_DIGEST:
            raise DigestError(f"{name} in {folder} was not packaged, and has no digest: delete it")
    counted = sum((folder / name).stat().st_size for name in (ARTIFACT, *digests["code"]))
    if n_bytes != counted:
        raise DigestError(f"{SUBMISSION} in {folder} says {n_bytes} bytes, and artifact and code have {counted:,}")
    return digests


def data_digest(tokenizer: str, shards: Sequence[str]) -> str:
    """SHA-256 of a split, as HymbaDataModule.data_digest: from the tokenizer's and the shards' in order."""
    return hashlib.sha256("\n".join([tokenizer, *shards]).encode()).hexdigest()


def verify_data(digests: dict[str, Any], tokenizer: Path, shards: Sequence[Path]) -> None:
    """
    Raises:
        DigestError: the tokenizer or the validation shards are not those of the recorded score.
    """
    data, found = digests["data"], sha256(tokenizer)
    if found != data["tokenizer"]:
        raise DigestError(
            f"{tokenizer} is not the tokenizer of the recorded score: its SHA-256 is {found}, not {data['tokenizer']}"
        )
    if data_digest(found, [sha256(path) for path in shards]) != data["digest"]:
        names = ", ".join(path.name for path in shards[:3]) + (", …" if len(shards) > 3 else "")
        raise DigestError(
            f"the validation data ({names} in {shards[0].parent}) are not those of the recorded score: "
            "give --data with the folder of those"
        )


def verify_count(digests: dict[str, Any], tokens: int, n_bytes: int) -> None:
    """
    Raises:
        DigestError: another number of tokens or bytes was scored than in the recorded score.
    """
    data = digests["data"]
    if (tokens, n_bytes) != (data["tokens"], data["bytes"]):
        raise DigestError(
            f"{tokens:,} tokens of {n_bytes:,} bytes were scored, and {data['tokens']:,} of "
            f"{data['bytes']:,} in the recorded score"
        )


def verify_score(folder: Path, val_bpb: float, tolerance: float) -> None:
    """
    Raises:
        DigestError: submission.json claims another score.
    """
    claimed = _read(folder / SUBMISSION).get("val_bpb")
    # Written so that NaN is refused too.
    if not (isinstance(claimed, int | float) and abs(claimed - val_bpb) <= tolerance):
        raise DigestError(
            f"{SUBMISSION} in {folder} claims {claimed} bits per byte, and the folder scores {val_bpb:.6f}: more than "
            f"{tolerance:g} apart"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DigestError(f"{path} is missing: what the folder holds cannot be verified") from None
    except (ValueError, RecursionError) as error:
        raise DigestError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise DigestError(f"{path} is damaged: no dictionary")
    return content
