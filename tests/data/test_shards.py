"""The shard format: what is written is read back, and every damaged file ends in an error that names it."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.data.shard_writing import ShardWriter, write_shard
from hymba_lightning.data.shards import HEADER_BYTES, MAGIC, Shard, ShardError, find_shards


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, np.arange(100))
    return path


def _set_header(path: Path, index: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[4 * index : 4 * index + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(raw)


def test_layout_is_the_challenges(shard: Path) -> None:
    raw = shard.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 100]
    assert not header[3:].any()
    assert np.frombuffer(raw[1024:], dtype="<u2").tolist() == list(range(100))


def test_reads_back_any_range_as_int64(shard: Path) -> None:
    opened = Shard(shard)
    assert opened.n_tokens == 100
    assert opened.read(7, 12).tolist() == [7, 8, 9, 10, 11]
    assert opened.read(7, 12).dtype == np.int64
    assert opened.read(100, 100).size == 0
    with pytest.raises(IndexError, match=r"x_train_000000\.bin.*99:101"):
        opened.read(99, 101)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "500 bytes are fewer"),
        (lambda path: path.write_bytes(b"PK" + bytes(4000)), "not a token shard"),
        (lambda path: _set_header(path, 1, 2), "shard version 2"),
        (lambda path: _set_header(path, 2, 101), "declares 101 tokens"),
        (lambda path: _set_header(path, 2, -5), "declares -5 tokens"),
        (lambda path: _set_header(path, 2, 0), "declares 0 tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the file has 1223"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "the file has 1226"),
    ],
)
def test_damaged_file_is_named(shard: Path, damage, message: str) -> None:
    damage(shard)
    with pytest.raises(ShardError, match=rf"x_train_000000\.bin: .*{message}"):
        Shard(shard)


@given(st.binary(max_size=40), st.integers(0, 30), st.integers(-50, 50))
@settings(max_examples=100, deadline=None)
def test_any_header_is_read_right_or_refused(tmp_path_factory: pytest.TempPathFactory, noise, place, growth) -> None:
    path = tmp_path_factory.mktemp("header") / "s.bin"
    write_shard(path, np.arange(20))
    raw = bytearray(path.read_bytes())
    raw[place : place + len(noise)] = noise
    raw = raw[: len(raw) + growth] if growth < 0 else raw + bytes(growth)
    path.write_bytes(raw)
    header = np.frombuffer(bytes(raw[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")), dtype="<i4")
    sound = header[0] == MAGIC and header[1] == 1 and header[2] > 0 and len(raw) == HEADER_BYTES + 2 * int(header[2])
    if sound:
        assert Shard(path).n_tokens == header[2]
    else:
        with pytest.raises(ShardError, match=r"s\.bin"):
            Shard(path)


def test_id_beyond_the_vocabulary_is_found_when_opened(shard: Path) -> None:
    with pytest.raises(ShardError, match=r"x_train_000000\.bin: token 64 has id 64, but the tokenizer has only 64"):
        Shard(shard, vocab_size=64)


def test_id_beyond_the_vocabulary_is_found_wherever_it_is_read(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_lightning.data.shards.OPEN_CHECK_TOKENS", 10)
    opened = Shard(shard, vocab_size=64)
    opened.read(0, 64)
    with pytest.raises(ShardError, match="token 64 has id 64"):
        opened.read(60, 70)


def test_shard_that_shrinks_or_vanishes_in_use_is_named(shard: Path) -> None:
    opened = Shard(shard)
    os.truncate(shard, 1100)
    with pytest.raises(ShardError, match=r"x_train_000000\.bin: the shard shrank from 1224 to 1100 bytes"):
        opened.read(90, 95)
    shard.unlink()
    with pytest.raises(ShardError, match=r"x_train_000000\.bin: .*cannot be read now"):
        opened.read(0, 5)


@pytest.mark.parametrize("tokens", [np.array([]), np.zeros((2, 2)), np.array([-1]), np.array([65536])])
def test_refuses_to_write_what_the_format_cannot_hold(tmp_path: Path, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"s\.bin"):
        write_shard(tmp_path / "s.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_file_whole_and_nothing_else(shard: Path) -> None:
    before = shard.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let files grow past the limit just as it does when the disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_shard(shard, np.zeros(100_000, dtype=np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shard.read_bytes() == before
    assert os.listdir(shard.parent) == [shard.name]


def test_writer_cuts_a_stream_into_shards(tmp_path: Path) -> None:
    tokens = np.arange(25, dtype=np.uint16)
    with ShardWriter(tmp_path, "a_train", 10) as writer:
        for start, stop in ((0, 3), (3, 21), (21, 25)):
            writer.append(tokens[start:stop])
    assert [path.name for path in writer.paths] == [f"a_train_00000{i}.bin" for i in range(3)]
    assert [Shard(path).n_tokens for path in writer.paths] == [10, 10, 5]
    assert np.concatenate([Shard(path).read(0, Shard(path).n_tokens) for path in writer.paths]).tolist() == [*range(25)]
    assert writer.n_tokens == 25


def test_writer_keeps_no_unfinished_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a_train", 10) as writer:  # noqa: PT012
        writer.append(np.arange(13))
        raise KeyError
    assert os.listdir(tmp_path) == ["a_train_000000.bin"]


def test_globs_are_sorted_and_relative_to_the_folder(tmp_path: Path) -> None:
    for name in ("b_train_000001.bin", "b_train_000000.bin", "b_val_000000.bin"):
        write_shard(tmp_path / name, np.arange(3))
    found = [path.name for path in find_shards("*_train_*.bin", tmp_path)]
    assert found == ["b_train_000000.bin", "b_train_000001.bin"]
    assert find_shards(str(tmp_path / "*_val_*"), "/nowhere") == [tmp_path / "b_val_000000.bin"]
    with pytest.raises(FileNotFoundError, match=r"no shard matches .*none\*.*hymba prepare"):
        find_shards("none*", tmp_path)
