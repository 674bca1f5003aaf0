"""Checkpoint files: read by everyone, damaged by no one unnoticed; what a resumed run must find in them."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_lightning import TinyData, TinyModule, assert_same

from hymba_lightning.callbacks.checkpoint_io import DigestCheckpointIO
from hymba_lightning.checkpoints import (
    COMMENT_BYTES,
    CheckpointError,
    check_clock_state,
    check_tokenizer,
    has_digest,
    read_checkpoint,
    write_checkpoint,
)

N_DAMAGED = 400
VALUES = {
    "state_dict": {"a": torch.arange(300.0).view(3, 100), "b": torch.ones(7, dtype=torch.int64)},
    "global_step": 12,
    "callbacks": {"WallClock": {"elapsed": 3.5, "steps": 12, "recent": [0.25] * 12}},
}


def same(a: dict, b: dict) -> bool:
    return (
        a.keys() == b.keys()
        and all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
        and {k: v for k, v in a.items() if k != "state_dict"} == {k: v for k, v in b.items() if k != "state_dict"}
    )


def saved_elsewhere() -> bytes:
    buffer = io.BytesIO()
    torch.save(VALUES, buffer)
    return buffer.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, VALUES)
    return path


def damage(content: bytes, rng: random.Random) -> bytes:
    """Another file: bits flipped; bytes lost, repeated, overwritten, zeroed; blocks swapped; cut short; made longer."""
    damaged = content
    while damaged == content:
        kind, start, length = rng.randrange(8), rng.randrange(len(content)), rng.choice([1, 1, 8, 512, 4096])
        piece = content[start : start + length]
        if kind == 0:
            damaged = content[:start]
        elif kind == 1:
            damaged = content[:start] + content[start + length :]
        elif kind == 2:
            damaged = content[:start] + piece + content[start:]
        elif kind == 3:
            damaged = content[:start] + bytes(len(piece)) + content[start + length :]
        elif kind == 4:
            damaged = content[:start] + rng.randbytes(len(piece)) + content[start + length :]
        elif kind == 5:
            damaged = content + rng.randbytes(length)
        elif kind == 6:
            half = len(content) // 2
            damaged = content[half:] + content[:half]
        else:
            flipped = bytearray(content)
            flipped[start] ^= 1 << rng.randrange(8)
            damaged = bytes(flipped)
    return damaged


def test_torch_lightning_and_zip_tools_read_the_file_as_any_other(file):
    assert same(read_checkpoint(file), VALUES)
    assert same(read_checkpoint(file, mmap=True), VALUES)
    for mmap in (False, True):
        assert same(torch.load(file, weights_only=True, mmap=mmap), VALUES)
    assert zipfile.ZipFile(file).testzip() is None
    assert hashlib.sha256(file.read_bytes()[:-64]).hexdigest() == file.read_bytes()[-64:].decode()
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("allow_undigested", [False, True])
def test_no_damaged_file_is_read(file, allow_undigested):
    content, rng = file.read_bytes(), random.Random(0)
    for _ in range(N_DAMAGED):
        file.write_bytes(damage(content, rng))
        with pytest.raises(CheckpointError, match=r"last\.ckpt"):
            read_checkpoint(file, allow_undigested=allow_undigested)
    # Every byte of the end, where the digest and what points to it are.
    for position in range(len(content) - COMMENT_BYTES - 22, len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"damaged|truncated"):
                read_checkpoint(file, allow_undigested=allow_undigested)


def test_a_file_of_something_else_needs_a_word_and_is_warned_of(tmp_path, caplog, monkeypatch):
    path, content = tmp_path / "x.ckpt", saved_elsewhere()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no digest.*allow_undigested"):
        read_checkpoint(path)
    monkeypatch.setattr(logging.getLogger("hymba_lightning"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert same(read_checkpoint(path, allow_undigested=True), VALUES)
    assert "has no digest" in caplog.text
    # torch does not check the CRC-32 of what it loads.
    position = content.index(struct.pack("<f", 77.0))
    path.write_bytes(content[:position] + b"\1" + content[position + 1 :])
    assert not same(torch.load(path, weights_only=True), VALUES)
    with pytest.raises(CheckpointError, match="damaged: the checksum of its part"):
        read_checkpoint(path, allow_undigested=True)


def test_another_digest_does_not_help(tmp_path, file):
    other = tmp_path / "other.ckpt"
    write_checkpoint(other, VALUES | {"global_step": 13})
    file.write_bytes(file.read_bytes()[:-64] + other.read_bytes()[-64:])
    with pytest.raises(CheckpointError, match="do not match its digest"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "neither an artifact nor a checkpoint"),
        (b"\x89HYMBA\r\n" + bytes(200), "neither an artifact nor a checkpoint"),
        (b"PK\x03\x04" + bytes(500), "truncated"),
        (b"hymba sha256 " * 40, "damaged"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, match):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(path, allow_undigested=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "missing.ckpt")


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed_and_bombs_are_refused(tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"a": Malicious()})
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
    for values, named in (({"a": Malicious()}, "it holds print"), ({"a": Path("x")}, "it holds pathlib")):
        write_checkpoint(path, values)
        with pytest.raises(CheckpointError, match=named) as refused:
            read_checkpoint(path)
        # torch advises to load the file all the same, in bold letters.
        assert "weights_only" not in str(refused.value)
        assert str(refused.value).isprintable()
    write_checkpoint(path, [1, 2])
    with pytest.raises(CheckpointError, match="no dictionary"):
        read_checkpoint(path)
    squeezed = tmp_path / "y.ckpt"
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 << 20))
    with pytest.raises(CheckpointError, match="compressed or overlaps"):
        read_checkpoint(squeezed, allow_undigested=True)


def test_a_full_disk_leaves_the_file_before(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match=r"^\[Errno 28\] no space left: '.*last\.ckpt'$"):
        write_checkpoint(file, VALUES | {"global_step": 13})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def trainer(folder) -> Trainer:
    return Trainer(
        plugins=[DigestCheckpointIO()],
        max_steps=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
    )


def test_a_trainer_with_the_plugin_writes_digests_and_refuses_damage(tmp_path):
    path = tmp_path / "a.ckpt"
    module, first = TinyModule(), trainer(tmp_path)
    first.fit(module, TinyData())
    first.save_checkpoint(path)
    assert has_digest(path)
    resumed = TinyModule()
    second = trainer(tmp_path)
    second.fit(resumed, TinyData(), ckpt_path=str(path), weights_only=True)
    assert second.global_step == 3
    assert_same(resumed.weights(), module.weights())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not match its digest"):
        trainer(tmp_path).fit(TinyModule(), TinyData(), ckpt_path=str(path), weights_only=True)


CLOCK = {"elapsed": 3.5, "steps": 12, "recent": [0.25] * 10}


def test_a_true_clock_passes():
    check_clock_state("x", CLOCK, 12)
    check_clock_state("x", {"elapsed": 0.0, "steps": 0, "recent": []}, 0)
    check_clock_state("x", {"elapsed": 2.4999999, "steps": 10, "recent": [0.25] * 10}, 10)  # rounding


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"elapsed": -1e9}, "shows -1000000000.0 seconds"),
        ({"elapsed": math.nan}, "shows nan"),
        ({"elapsed": math.inf}, "shows inf"),
        ({"elapsed": 1e12}, "shows 1000000000000.0"),
        ({"elapsed": "3.5"}, "shows '3.5'"),
        ({"elapsed": True}, "shows True"),
        ({"elapsed": None}, "shows None"),
        ({"elapsed": 0.1}, "last 10 steps took 2.500 s, and its training clock shows 0.100 s"),
        ({"steps": -1}, "counted -1 steps where 12"),
        ({"steps": 12.0}, "counted 12.0"),
        ({"steps": 11}, "counted 11"),
        ({"steps": 1000}, "counted 1000"),
        ({"recent": []}, "0 durations for 12 steps"),
        ({"recent": 3}, "durations"),
        ({"recent": [0.1] * 13}, "13 durations for 12"),
        ({"recent": [-1.0]}, "no seconds"),
        ({"recent": [math.nan]}, "no seconds"),
        ({"recent": ["1"]}, "no seconds"),
    ],
)
def test_an_absurd_clock_is_refused(changes, match):
    with pytest.raises(CheckpointError, match=f"run/last.ckpt: .*{match}.*train anew"):
        check_clock_state("run/last.ckpt", CLOCK | changes, 12)


@pytest.mark.parametrize(
    ("state", "match"),
    [(None, "lacks the state"), *((state, "malformed") for state in ([], 3.5, {}, {"elapsed": 3.5, "steps": 12}))],
)
def test_a_checkpoint_without_a_clock_is_refused(state, match):
    with pytest.raises(
        CheckpointError, match=f"{match}.* of the training clock|state of the training clock is {match}"
    ):
        check_clock_state("x", state, 12)


@pytest.mark.parametrize("step", [None, -1, 12.0, "12", True])
def test_absurd_steps_are_refused(step):
    with pytest.raises(CheckpointError, match="trained for"):
        check_clock_state("x", CLOCK, step)


def test_a_checkpoint_of_another_tokenizer_is_refused():
    check_tokenizer("x", "ab" * 32, "ab" * 32)
    with pytest.raises(CheckpointError, match=r"x was made for another tokenizer \(sha256 cdcd.*--data.tokenizer"):
        check_tokenizer("x", "cd" * 32, "ab" * 32)
    with pytest.raises(CheckpointError, match="does not say which tokenizer"):
        check_tokenizer("x", None, "ab" * 32)
