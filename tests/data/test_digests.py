"""Digests: the file's own SHA-256, read once, never believed of a changed file, whoever asks and wherever it lies."""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from hymba_lightning.data import digests
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.digests import file_digests, hash_file, remember
from hymba_lightning.data.shard_writing import write_shard

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files of several blocks that nobody has touched lately."""
    monkeypatch.setattr(digests, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [tmp_path / "data" / f"{index}.bin" for index in range(3)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(os.urandom(5500))
    return paths


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read as a whole."""
    names = []
    monkeypatch.setattr(digests, "hash_file", lambda path: (names.append(Path(path).name), hash_file(path))[1])
    return names


def plain(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_they_are_the_files_own_and_made_once(files, hashed):
    assert file_digests([*files, files[0]]) == plain([*files, files[0]])
    assert sorted(hashed) == ["0.bin", "1.bin", "2.bin"]
    assert file_digests(files) == plain(files)
    assert len(hashed) == 3


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_hashed_again(files, hashed, keep_times):
    file_digests(files)
    stat = files[1].stat()
    content = files[1].read_bytes()
    files[1].write_bytes(content[:2750] + bytes(2750))
    if keep_times:
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digests(files, sample=False) == plain(files)
    assert hashed[3:] == ["1.bin"]


def test_damage_that_leaves_no_time_stamp_is_found_by_the_sample(files, hashed):
    file_digests(files)
    memory = json.loads((files[0].parent / ".digests.json").read_text())
    files[2].write_bytes(bytes(5500))
    stat = files[2].stat()
    memory["2.bin"][0] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    (files[0].parent / ".digests.json").write_text(json.dumps(memory))
    assert file_digests(files, sample=False) != plain(files)
    assert file_digests(files) == plain(files)
    assert hashed[3:] == ["2.bin"]


def test_a_file_of_this_moment_is_not_believed_later(files, hashed, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 2.0)
    file_digests(files)
    file_digests(files)
    assert len(hashed) == 6


def test_its_writer_need_not_wait(files, hashed, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 2.0)
    remember(files[0].parent, {path.name: hash_file(path) for path in files})
    assert file_digests(files) == plain(files)
    assert hashed == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"0.bin": 3, "1.bin": [[1], "x", ["y"]]}', b"[" * 100_000])
def test_a_damaged_memory_is_made_anew(files, hashed, content):
    (files[0].parent / ".digests.json").write_bytes(content)
    assert file_digests(files) == plain(files)
    assert file_digests(files) == plain(files)
    assert len(hashed) == 3


def test_a_pipe_in_the_place_of_the_memory_is_no_reason_to_wait(files):
    os.mkfifo(files[0].parent / ".digests.json")
    assert file_digests(files) == plain(files)


def test_a_folder_that_cannot_be_written_to_is_remembered_in_the_cache(files, hashed, monkeypatch):
    write = digests.write_atomic

    def read_only(path, content):
        if path.parent == files[0].parent:
            raise OSError(30, "Read-only file system")
        write(path, content)

    monkeypatch.setattr(digests, "write_atomic", read_only)
    assert [file_digests(files) for _ in range(2)] == [plain(files)] * 2
    assert len(hashed) == 3


def test_where_nothing_can_be_remembered_every_call_hashes(files, hashed, monkeypatch):
    def refused(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(digests, "write_atomic", refused)
    assert [file_digests(files) for _ in range(2)] == [plain(files)] * 2
    assert len(hashed) == 6


def _ask(paths, barrier, answers):
    calls = []

    def slow(path):
        calls.append(path)
        time.sleep(0.2)
        return hash_file(path)

    digests.hash_file, digests.SETTLED_SECONDS = slow, -1.0
    barrier.wait()
    answers.put((file_digests(paths), len(calls)))


def test_of_several_processes_at_once_one_hashes(files):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_ask, args=(files, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    given = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert [digest for digest, _ in given] == [plain(files)] * 4
    assert sorted(calls for _, calls in given) == [0, 0, 0, 3]


# Of a split -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    for name, start in (("x_train_000000", 0), ("x_train_000001", 100), ("x_val_000000", 500)):
        write_shard(folder / f"{name}.bin", np.arange(start, start + 100))
    return folder


def test_a_splits_digest_says_what_its_tokens_are(folder, tmp_path):
    digest = HymbaDataModule(str(folder)).data_digest
    assert len({digest("train"), digest("val")}) == 2
    assert len(digest("val")) == 64
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert HymbaDataModule(str(copy)).data_digest("train") == digest("train")

    before = digest("train")
    write_shard(folder / "x_train_000001.bin", np.arange(101, 201))
    assert digest("train") != before
    os.replace(copy / "x_train_000000.bin", copy / "y")
    os.replace(copy / "x_train_000001.bin", copy / "x_train_000000.bin")
    os.replace(copy / "y", copy / "x_train_000001.bin")
    assert HymbaDataModule(str(copy)).data_digest("train") != before  # another order
    with pytest.raises(ValueError, match="split is 'test'; it must be one of train, val"):
        digest("test")


def test_a_splits_digest_knows_the_tokenizer(folder, tmp_path):
    from hymba_lightning.data.tokenizer import train_tokenizer

    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["some text " * 50], 270))
    ours = HymbaDataModule(str(folder)).data_digest("val")
    assert HymbaDataModule(str(folder), str(other)).data_digest("val") != ours
