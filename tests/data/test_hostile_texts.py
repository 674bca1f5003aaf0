"""Lines, rows and texts that are damaged or of another kind: skipped, named, fatal with strict."""

import csv
import gzip
import io
import json
import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS, json_lines, only_kind, read

from hymba_lightning.data import documents
from hymba_lightning.data.documents import DocumentReader, unescaped
from hymba_lightning.data.inputs import InputFile
from hymba_lightning.data.skips import Skips
from hymba_lightning.data.streams import bounded_lines

TEXTS = TEXTS[:40]
LINES = json_lines(TEXTS)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'{"text": ' + b'{"a":' * 200_000,
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": ["a"]}',
        b'{"text": {"a": 1}}',
        b'["text"]',
        b"7",
        b"nul",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"other": "a"}',
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "a\0b"}',
        b"\xff\xfe{",
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)
def test_a_line_without_text_is_skipped_and_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES[: LINES.index(b"\n") + 1] + line + b"\n" + LINES[LINES.index(b"\n") + 1 :])
    texts, skipped = read(path)
    assert texts == TEXTS
    assert skipped["count"] == 1 + line.count(b"\n")
    assert "a.jsonl:2: " in skipped["first"][0]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*without strict"):
        read(path, strict=True)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "csv"])
def test_a_line_over_the_limit_is_left_out_by_name(tmp_path, suffix):
    long = "y" * 5000
    content = (
        "text\n" + f"short\n{long}\nlast\n"
        if suffix == "csv"
        else "".join(json.dumps({"text": text}) + "\n" for text in ("short", long, "last"))
    ).encode()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(suffix[-3:].strip("."), bytes)(content))
    texts, skipped = read(path, max_bytes=4000)
    assert texts == (["short"] if suffix == "csv" else ["short", "last"])
    assert only_kind(skipped) == "too long"
    assert "longer than 4,000 bytes; raise max_document_bytes" in skipped["first"][0]
    assert read(path, max_bytes=6000)[0] == ["short", long, "last"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 40), st.integers(1, 12))
def test_bounded_lines_are_the_lines(lines, limit, step):
    content = b"\n".join(lines)
    blocks = [content[start : start + step] for start in range(0, len(content), step)]
    wanted = content.split(b"\n")
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted
    assert list(bounded_lines(blocks, limit)) == [line if len(line) <= limit else None for line in wanted]


def test_line_ends_byte_order_marks_and_other_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n\xef\xbb\xbf")
    assert read(tmp_path / "a.txt")[0] == ["one\ntwo\nthree\n\n\ufeff"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')
    assert read(tmp_path / "b.jsonl") == (["a\r\nb", "c"], Skips().state())
    for name, content, cause in (
        ("c.txt", "Größe".encode("utf-16"), "UTF-16"),
        ("d.txt", b"a\0b", "NUL"),
        ("e.txt", b"good \xc3", "not UTF-8 text"),
        ("f.txt", b"\xff", "at byte 0"),
    ):
        (tmp_path / name).write_bytes(content)
        texts, skipped = read(tmp_path / name)
        assert texts == []
        assert cause in skipped["first"][0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "é", "日本", "😀", "\n", "\n\n", " ", "\r\n", "<end>"]), max_size=300).map("".join),
    st.sampled_from([None, "<end>", "\n\n"]),
    st.integers(40, 200),
)
def test_a_text_read_in_pieces_is_the_same_text(tmp_path_factory, text, separator, most):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    wanted = text.replace("\r\n", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TEXT_BLOCK_BYTES", 7)
        pieces, skipped = read(path, separator=separator, max_bytes=most)
    assert "".join(pieces) == (wanted if separator is None else wanted.replace(separator, ""))
    assert all(len(piece.encode()) <= most for piece in pieces)
    assert skipped["count"] == 0
    whole, _ = read(path, separator=separator)
    if all(len(document.encode()) <= most for document in whole):
        assert pieces == whole
    else:
        assert len(skipped["notes"]) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_utf16_lines_are_one_file_that_is_named_not_a_skip_a_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(LINES.decode().encode("utf-16"))
    texts, skipped = read(path)
    assert (texts, skipped["count"]) == ([], 1)
    assert f"a.{suffix}: not UTF-8 text but UTF-16; convert it" in skipped["first"][0]


def test_separators_are_understood_as_typed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n\nthree")
    assert read(tmp_path / "a.txt", separator=unescaped(r"\n\n"))[0] == ["one", "two", "three"]
    assert [unescaped(typed) for typed in (r"\t", r"\\n", "\r\n", "<é>", r"\r\n")] == ["\t", "\\n", "\n", "<é>", "\n"]


def test_csv_and_tsv_are_read(tmp_path):
    rows = ["plain", "a, b", 'said "so"', "two\nlines", "", "ünï"]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerows([["id", "text"], *([index, row] for index, row in enumerate(rows))])
        (tmp_path / f"a.{suffix}").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
        texts, skipped = read(tmp_path / f"a.{suffix}")
        assert texts == [row for row in rows if row]
        assert skipped["count"] == 0
    assert read(tmp_path / "a.csv", text_key="body")[1]["first"][0].endswith(
        "no column 'body' among id, text; set text_key"
    )


def test_blank_lines_before_a_csv_header_are_no_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\n\r\nid,text\n\n1,a\n")
    assert read(tmp_path / "a.csv") == (["a"], Skips().state())


def test_what_is_said_of_a_file_is_short_and_steers_no_terminal(tmp_path):
    """A column's name is the file's own word, and may be anything."""
    (tmp_path / "a.csv").write_text('id,"\x1b[2J\nfree",' + "x" * 100_000 + "\n1,2,3\n")
    said = read(tmp_path / "a.csv")[1]["first"][0]
    assert said.isprintable()
    assert len(said) < 1100
    assert "no column 'text' among id, " in said
    with pytest.raises(ValueError, match="no column 'text'") as refused:
        read(tmp_path / "a.csv", strict=True)
    assert str(refused.value).isprintable()


def test_a_file_that_vanishes_before_its_turn_is_skipped_and_named(tmp_path):
    files = []
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(LINES)
        files.append(InputFile(tmp_path / name, name))
    reader = DocumentReader(files, "text", None)
    (tmp_path / "b.jsonl").unlink()
    assert [document.text for document in reader] == 2 * TEXTS
    assert reader.skips.state()["first"] == [f"{tmp_path / 'b.jsonl'}: No such file or directory"]
    assert reader.bytes_read == reader.total_bytes


@pytest.mark.parametrize(
    ("content", "wanted", "cause"),
    [
        (b"id,text\n1,a\n2,b,c\n3,d\n", ["a", "d"], "a.csv:3: 3 fields, not 2"),
        (b'id,text\n1,a\n2,"b\n3,d\n', ["a"], "unexpected end of data"),
        (b'id,text\n1,a\n2,"b"x\n3,d\n', ["a", "d"], "a.csv:3: no row of CSV"),
        (b"id,text\n1,a\n2,\xff\n", ["a"], "line 3: not UTF-8 text"),
        (b"id,text\n1,a\n2,\0\n", ["a"], "line 3: it holds NUL bytes"),
        (b'id,text\n1,a\n2,"' + b"x\n" * 3000, ["a"], "field larger than field limit"),
    ],
)
def test_damaged_csv_is_skipped_and_named(tmp_path, content, wanted, cause):
    (tmp_path / "a.csv").write_bytes(content)
    texts, skipped = read(tmp_path / "a.csv", max_bytes=4000)
    assert texts == wanted
    assert skipped["count"] == 1
    assert cause in skipped["first"][0]


def test_noise_never_passes_for_an_error_of_ours(tmp_path):
    noise = random.Random(0)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "txt", "tsv.zst"):
        for _ in range(150):
            content = noise.randbytes(noise.randrange(200))
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            read(path, max_bytes=noise.choice([8, 1 << 20]))
