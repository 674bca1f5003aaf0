"""Compressed texts that end early, are damaged or blow up: what is whole is read, the rest is named."""

import gzip
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS, json_lines, only_kind, read, run

from hymba_lightning.data.skips import Skips
from hymba_lightning.data.streams import SourceError, read_blocks, whole_members

TEXTS = TEXTS[:40]
LINES = json_lines(TEXTS)


def zstd_of(content: bytes, frames: int = 1) -> bytes:
    step = -(-len(content) // frames)
    return b"".join(zstandard.compress(content[start : start + step]) for start in range(0, len(content), step))


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        zstd_of,
        lambda content: zstd_of(content, 5),
        lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]),
        lambda content: b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd_of(content),
    ],
    ids=["gz", "zst", "zst frames", "gz members", "zst skippable frame"],
)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_truncated_stream_is_called_truncated(tmp_path, pack, share):
    packed = pack(LINES)
    suffix = "gz" if packed[:2] == b"\x1f\x8b" else "zst"
    whole, cut = tmp_path / f"whole.jsonl.{suffix}", tmp_path / f"cut.jsonl.{suffix}"
    whole.write_bytes(packed)
    assert read(whole) == (TEXTS, Skips().state())
    cut.write_bytes(packed[: int(share * len(packed))])
    texts, skipped = read(cut)
    assert texts == TEXTS[: len(texts)]
    assert (skipped["count"], only_kind(skipped)) == (1, "truncated")
    assert f"cut.jsonl.{suffix}: truncated: the " in skipped["first"][0]
    with pytest.raises(ValueError, match=r"cut\.jsonl.*truncated.*prepare without strict"):
        read(cut, strict=True)


def zstd_with_checksum(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_noticed_or_harmless(tmp_path_factory, suffix, data):
    packed = bytearray(gzip.compress(LINES) if suffix == "gz" else zstd_with_checksum(LINES))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("changed") / f"a.jsonl.{suffix}"
    path.write_bytes(packed)
    texts, skipped = read(path)
    # A gzip header's time and flags are no content.
    assert texts == TEXTS or (skipped["count"] >= 1 and texts == [])


@pytest.mark.parametrize("pack", [gzip.compress, zstd_with_checksum], ids=["gz", "zst"])
def test_what_no_checksum_vouches_for_is_not_read(tmp_path, pack):
    """Bytes lost from the middle give other texts, or an early end, long before the checksum tells."""
    halves = [pack(json_lines(TEXTS[:20])), pack(json_lines(TEXTS[20:]))]
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    for lost in range(30, len(halves[1]) - 30, 17):
        path.write_bytes(halves[0] + halves[1][:lost] + halves[1][lost + 1 :])
        texts, skipped = read(path)
        assert texts == TEXTS[:20]
        assert skipped["count"] == 1
        assert "bytes of its whole members are read" in skipped["first"][0]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_that_holds_nothing_is_told(tmp_path, content):
    """A stream that was cut where one ends, or a copy that failed, looks like a file with nothing in it."""
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd_with_checksum)):
        (tmp_path / name).write_bytes(pack(content))
        texts, skipped = read(tmp_path / name)
        assert (texts, skipped["count"]) == ([], 0)
        assert skipped["notes"] == {"file without a document": {"count": 1, "first": [str(tmp_path / name)]}}
    (tmp_path / "a.txt").write_bytes(b"")
    assert list(read(tmp_path / "a.txt")[1]["notes"]) == ["file without a document"]
    (tmp_path / "b.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x03\0\0\0abc")
    assert list(read(tmp_path / "b.jsonl.zst")[1]["notes"]) == ["file without a document"]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    with open(path, "rb") as raw:
        whole = whole_members(path, raw)
    assert whole == (len(LINES), None)
    path.write_bytes(gzip.compress(LINES[:100]))
    with open(path, "rb") as raw, pytest.raises(SourceError, match="changed while it was read"):
        list(read_blocks(path, raw, whole))


@pytest.mark.parametrize("option", ["dictionary", "window"])
def test_what_zstd_needs_and_does_not_have_is_named(tmp_path, option):
    if option == "dictionary":
        packer = zstandard.ZstdCompressor(
            dict_data=zstandard.train_dictionary(2000, [LINES[k:][:300] for k in range(2000)])
        )
        packed = packer.compress(LINES)
    else:
        parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        packed = stream.compress(LINES) + stream.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    texts, skipped = read(tmp_path / "a.jsonl.zst")
    assert texts == []
    assert only_kind(skipped) == {"dictionary": "zstd dictionary needed", "window": "zstd window too large"}[option]
    assert "a.jsonl.zst: " in skipped["first"][0]
    assert "decompress it with" in skipped["first"][0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("eight.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
        ("text.jsonl.gz", b"plain text\n"),
        ("text.jsonl.zst", b"plain text\n"),
        ("more.jsonl.gz", gzip.compress(LINES) + b"garbage"),
        ("more.jsonl.zst", zstd_of(LINES) + b"garbage"),
        ("body.jsonl.gz", gzip.compress(LINES)[:40] + b"\xff" * 300),
    ],
)
def test_a_corrupt_stream_costs_itself_only(tmp_path, tokenizer, name, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "good.jsonl").write_bytes(LINES)
    summary = run(tmp_path / "in", tmp_path / "out", tokenizer)
    assert sum(split["documents"] for split in summary.manifest["splits"].values()) in (40, 80)
    assert summary.manifest["skipped"]["count"] == 1
    assert name in str(summary)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_line_of_half_a_gigabyte_takes_no_memory(tmp_path):
    packer = zstandard.ZstdCompressor(level=19).compressobj()
    with open(tmp_path / "bomb.jsonl.zst", "wb") as file:
        for _ in range(500):
            file.write(packer.compress(b"a" * 1_000_000))
        file.write(packer.flush())
    assert (tmp_path / "bomb.jsonl.zst").stat().st_size < 200_000
    # Not getrusage's peak, which is that of the process that started this one where that was larger.
    code = f"""
import re
from pathlib import Path
from hymba_lightning.data.streams import bounded_lines, read_blocks
path = Path({str(tmp_path / "bomb.jsonl.zst")!r})
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
before = peak()
with open(path, "rb") as raw:
    assert list(bounded_lines(read_blocks(path, raw), 1 << 25)) == [None]
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # KiB
