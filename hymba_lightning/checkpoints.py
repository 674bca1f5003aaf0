"""Checkpoints on disk: one file that torch can load, whose damage in any byte is noticed.

A checkpoint is the zip archive that `torch.save` writes. The archive's comment, which every reader of zip files skips,
holds the SHA-256 of all bytes before it: `torch.load` and Lightning read the file as any other, and `read_checkpoint`
reads it only where the digest is right. (torch itself checks nothing: flipped bits load as other weights.)
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.text import printable

log = logging.getLogger("hymba_lightning")

MARK = b"hymba sha256 "
DIGITS = 64  # of a SHA-256 in hexadecimal
COMMENT_BYTES = len(MARK) + DIGITS
# The last record of a zip archive; its last field is the length of the comment that follows.
END_RECORD, END_SIGNATURE = 22, b"PK\x05\x06"
PIECE = 1 << 20
# Where a checkpoint has the SHA-256 of the tokenizer it was trained with.
TOKENIZER_KEY = "tokenizer_sha256"
# All that torch.load's readers raise on malformed input; they document none of it.
READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
ANOTHER = "Go on from another checkpoint, or train anew"
# Ten years: no run's clock shows more.
MOST_SECONDS = 10 * 365 * 86_400.0


class CheckpointError(ValueError):
    """The file is no checkpoint that can be trusted: damaged, without a digest, or made for something else."""


def write_checkpoint(path: str | os.PathLike[str], values: dict[str, Any]) -> str:
    """Saves `values` (tensors and plain containers) at `path`, whole or not at all; returns the digest.

    Raises OSError where it cannot be written: an earlier file at `path` is then untouched.
    """
    buffer = io.BytesIO()
    torch.save(values, buffer)
    with buffer.getbuffer() as content:
        if bytes(content[-END_RECORD:][:4]) != END_SIGNATURE or bytes(content[-2:]) != b"\0\0":
            raise RuntimeError("torch.save no longer writes a zip archive without a comment: no place for the digest")
    buffer.seek(-2, os.SEEK_END)
    buffer.write(struct.pack("<H", COMMENT_BYTES) + MARK)
    with buffer.getbuffer() as content:
        digest = hashlib.sha256(content).hexdigest()
    buffer.write(digest.encode())
    # Serialized first: torch's own writer turns a full disk into other errors than OSError.
    write_atomic(Path(path), buffer.getvalue())
    return digest


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, whatever device they are on and order they are in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(
    path: str | os.PathLike[str], *, allow_undigested: bool = False, mmap: bool = False
) -> dict[str, Any]:
    """The dictionary in a checkpoint, tensors on the CPU, nothing in the file executed.

    Args:
        path: The file.
        allow_undigested: Read also a file of `torch.save` that something else wrote, with a warning; its parts must
            match their own CRC-32.
        mmap: Leave tensors in the file until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: naming the file, what is wrong with it and what to do.
    """
    with _opened(path) as file:
        _verify(Path(path), file, allow_undigested)
        file.seek(0)
        try:
            check_archive(file)
            file.seek(0)
            values = torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap or None)
        except READ_ERRORS as error:
            reason = _reason(error)
            raise CheckpointError(
                f"{path} is no checkpoint: it holds more than tensors and plain values, or is no "
                f"file of torch.save ({reason}). {ANOTHER}"
            ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{path} is no checkpoint: it holds no dictionary of named values. {ANOTHER}")
    return values


def has_digest(path: str | os.PathLike[str]) -> bool:
    """Whether a file ends as those of `write_checkpoint` do, its content unread."""
    try:
        with open(path, "rb") as file:
            file.seek(-COMMENT_BYTES, os.SEEK_END)
            return file.read(len(MARK)) == MARK
    except OSError:
        return False


def check_archive(file: BinaryIO) -> None:
    """Raises ValueError for anything but the uncompressed zip archive of torch.save, its parts within the file."""
    size = file.seek(0, os.SEEK_END)
    try:
        members = zipfile.ZipFile(file).infolist()
    except READ_ERRORS as error:
        raise ValueError(f"it is no archive of torch.save ({error})") from error
    if (
        any(member.compress_type != zipfile.ZIP_STORED for member in members)
        or sum(member.file_size for member in members) > size
    ):
        raise ValueError("its archive is compressed or overlaps, which torch.save never does")


def check_clock_state(path: str | os.PathLike[str], state: Any, global_step: Any) -> None:
    """Refuses a training clock's state that would give a resumed run time that it does not have.

    Args:
        path: The checkpoint, for the message.
        state: What the checkpoint has for the clock: {"elapsed": seconds, "steps": optimizer steps timed, "recent":
            seconds of the last ones}; None where it has nothing.
        global_step: Optimizer steps that the checkpoint was trained for.

    Raises:
        CheckpointError: the state is missing, malformed, not finite, negative, absurdly large or at odds with itself or
            with the steps.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}, so what is left of the budget is not known. {ANOTHER}")

    if state is None:
        raise refuse("it lacks the state of the training clock")
    if not isinstance(state, dict) or not {"elapsed", "steps", "recent"} <= set(state):
        raise refuse("the state of the training clock is malformed")
    elapsed, steps, recent = state["elapsed"], state["steps"], state["recent"]
    if not _is_seconds(elapsed):
        raise refuse(f"its training clock shows {elapsed!r} seconds")
    if not isinstance(recent, list) or not all(_is_seconds(duration) for duration in recent):
        raise refuse("its training clock has durations of steps that are no seconds")
    if type(global_step) is not int or global_step < 0:
        raise refuse(f"it was trained for {global_step!r} steps")
    if type(steps) is not int or steps != global_step:
        raise refuse(f"its training clock counted {steps!r} steps where {global_step} were trained")
    if len(recent) > steps or bool(steps) != bool(recent):
        raise refuse(f"its training clock has {len(recent)} durations for {steps} steps")
    # Steps do not overlap, so they took no longer than the clock ran; the rest is rounding.
    if sum(recent) > elapsed * (1 + 1e-6) + 1e-3:
        raise refuse(
            f"its last {len(recent)} steps took {sum(recent):.3f} s, and its training clock shows "
            f"{elapsed:.3f} s in all"
        )


def check_tokenizer(
    path: str | os.PathLike[str],
    recorded: Any,
    expected: str,
    tokenizer: str | os.PathLike[str] = "the data's",
    option: str = "--data.tokenizer",
) -> None:
    """Refuses weights that were trained on another tokenizer's ids: the vocabulary's size says nothing about them.

    Args:
        path: The checkpoint or artifact, for the message.
        recorded: SHA-256 (hexadecimal) of the tokenizer that the file names; None where it names none.
        expected: That of the tokenizer at hand.
        tokenizer: What the message calls that one.
        option: What the message asks to give another one with.

    Raises:
        CheckpointError: they differ, or the file names none.
    """
    if recorded == expected:
        return
    if recorded is None:
        raise CheckpointError(f"{path} does not say which tokenizer it was trained with. {ANOTHER}")
    raise CheckpointError(
        f"{path} was made for another tokenizer (sha256 {str(recorded)[:DIGITS]}) than {tokenizer} ({expected}): give "
        f"{option} the right one"
    )


def _reason(error: Exception) -> str:
    """What torch.load says is wrong, without its advice to load the file all the same, which would run its code."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        found = re.search(r"GLOBAL ([\w.]+)", text)
        return f"it holds {found[1] if found else 'other objects'}"
    return printable(text.partition("\n")[0].partition(". ")[0], 200) or type(error).__name__


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= MOST_SECONDS


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return open(path, "rb")


def _verify(path: Path, file: BinaryIO, allow_undigested: bool) -> str | None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - END_RECORD - COMMENT_BYTES, 0))
    end = file.read()
    plain_end = end[-END_RECORD:]
    if plain_end.startswith(END_SIGNATURE) and plain_end.endswith(b"\0\0"):
        _verify_undigested(path, file, allow_undigested)
        return None
    if MARK not in end and not end.startswith(END_SIGNATURE):
        state = "truncated" if _starts_like_a_zip(file) else "neither an artifact nor a checkpoint of torch.save"
        raise CheckpointError(f"{path} is {state}. {ANOTHER}")
    if not end.startswith(END_SIGNATURE) or end[END_RECORD - 2 : -DIGITS] != struct.pack("<H", COMMENT_BYTES) + MARK:
        raise CheckpointError(f"{path} is damaged: its end is not as it was written. {ANOTHER}")
    digest = _digest(file, size - DIGITS)
    if digest.encode() != end[-DIGITS:]:
        raise CheckpointError(f"{path} is damaged: its bytes do not match its digest. {ANOTHER}")
    return digest


def _verify_undigested(path: Path, file: BinaryIO, allowed: bool) -> None:
    if not allowed:
        raise CheckpointError(
            f"{path} has no digest: something else than `hymba fit` wrote it, and damage would pass "
            "unnoticed. If you trust it, say so with allow_undigested"
        )
    try:
        damaged = zipfile.ZipFile(file).testzip()
    except READ_ERRORS as error:
        raise CheckpointError(f"{path} is damaged: its archive cannot be read ({error}). {ANOTHER}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged!r} is wrong. {ANOTHER}")
    log.warning("%s has no digest, since something else than `hymba fit` wrote it: it is read all the same", path)


def _starts_like_a_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def _digest(file: BinaryIO, n_bytes: int) -> str:
    file.seek(0)
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    while n_bytes > 0:
        got = file.readinto(piece[: min(PIECE, n_bytes)])  # type: ignore[attr-defined]
        if not got:
            break
        digest.update(piece[:got])
        n_bytes -= got
    return digest.hexdigest()
