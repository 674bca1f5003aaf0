"""Lines, rows and texts that are damaged or of another kind: skipped, named, fatal with strict."""

import csv
import gzip
import io
import json
import random
import time
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS, json_lines, only_kind, read

from hymba_lightning.data import documents
from hymba_lightning.data import json_lines as json_lines_module
from hymba_lightning.data.documents import DocumentReader, unescaped
from hymba_lightning.data.inputs import InputFile
from hymba_lightning.data.skips import Skips
from hymba_lightning.data.streams import bounded_lines, n_lines

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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"bc", b"\r", b" "]), st.integers(1, 200), st.booleans()), max_size=5),
    st.integers(1, 500),
)
def test_many_empty_lines_are_given_at_once_and_counted(parts, step):
    content = b"".join(line + (b"\r\n" if crlf else b"\n") * ends for line, ends, crlf in parts)
    blocks = [content[start : start + step] for start in range(0, len(content), step)]
    items = list(bounded_lines(blocks, 10))
    wanted = content.split(b"\n")[:-1]
    assert b"\n".join(items).split(b"\n") == wanted or not wanted
    assert sum(map(n_lines, items)) == len(wanted)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_million_line_ends_take_no_time_and_lines_after_them_keep_their_numbers(tmp_path, end):
    lines = json_lines(["before", "after"]).splitlines()
    content = lines[0] + end + end * 1_000_000 + b"nul" + end + lines[1] + end
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.csv").write_bytes(b"text" + end * 1_000_000 + b'a,b\nbefore\n"two' + end * 300 + b'lines"' + end)
    started = time.process_time()
    texts, skipped = read(tmp_path / "a.jsonl")
    assert texts == ["before", "after"]
    assert "a.jsonl:1000002: " in skipped["first"][0]
    texts, skipped = read(tmp_path / "a.csv")
    assert texts == ["before", "two" + "\n" * 300 + "lines"]
    assert only_kind(skipped) == "damaged CSV"
    assert "a.csv:1000001: 2 fields, not 1" in skipped["first"][0]
    assert time.process_time() - started < 0.1


def test_what_is_only_counted_is_not_described(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{}\n" * 100_000 + b'{"text": 1}\n' + json_lines(["last"]))
    started = time.process_time()
    texts, skipped = read(tmp_path / "a.jsonl")
    assert texts == [*TEXTS, "last"]
    assert skipped["kinds"]["no text"]["count"] == 100_001
    assert [line.split(": ")[0][-2:] for line in skipped["kinds"]["no text"]["first"]] == ["41", "42", "43"]
    assert time.process_time() - started < 1


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "a", "é"]), inner, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES, st.integers(0, 200), st.sampled_from([b"", b" ", b",", b"]", b"}", b'"', b"\xff"]), st.booleans())
def test_lines_of_many_values_are_read_as_others_are(value, place, junk, ascii_only):
    line = json.dumps(value, ensure_ascii=ascii_only).encode()
    place = min(place, len(line))
    line = line[:place] + junk + line[place:]

    def outcome(read_line):
        try:
            got = read_line()
        except (ValueError, LookupError, TypeError) as error:
            return type(error)
        return type(got) if isinstance(got, list | dict) else repr(got)

    wanted = outcome(lambda: json.loads(line.decode())["text"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines_module, "MANY_VALUES", 0)
        got = outcome(lambda: json_lines_module.value_of(line, "text"))
    # A line without the key is not read: whether it is JSON does not matter.
    assert got == wanted or (got is KeyError and json_lines_module.lacks(line, "text"))


@pytest.mark.parametrize("rest", [b"[],", b"{},", b'{"text":[]},', b'"":[],'])
def test_a_line_of_many_values_takes_no_memory(monkeypatch, rest):
    monkeypatch.setattr(json_lines_module, "MANY_VALUES", 1000)
    many = rest * (300_000 // len(rest))
    line = b'{"text": "a", ' + (many + b'"b":1}' if rest.startswith(b'"') else b'"b":[' + many + b"1]}")
    tracemalloc.start()
    assert json_lines_module.value_of(line, "text") == "a"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(line)


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
    assert f"a.{suffix}: not UTF-8 text but UTF-16 or UTF-32; convert it" in skipped["first"][0]


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


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ("text,text", "2 columns 'text'; give all but the text's another name"),
        ("id;text", "its columns are cut by ';', not by ','; write it anew with ','"),
    ],
)
def test_a_csv_header_that_does_not_say_which_column_is_the_text_is_refused(tmp_path, header, cause):
    (tmp_path / "a.csv").write_text(f"{header}\n1,two\n")
    texts, skipped = read(tmp_path / "a.csv")
    assert texts == []
    assert skipped["first"][0].endswith(cause)


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
        (b"id,text\n1,a\n2,\xff\n3,d\n", ["a", "d"], "a.csv:3: not UTF-8 text"),
        (b"id,text\n1,a\n\xff2,b\n3,d\n", ["a", "d"], "a.csv:3: not UTF-8 text"),
        (b"id,text\n1,a\n2,b\0\n3,d\n", ["a", "d"], "a.csv:3: it holds NUL bytes"),
        (b"id,text,\xe9\n1,a,\n", [], "a.csv: the header: not UTF-8 text"),
        (b"id,text\n1,a\n2," + b"x" * 5000 + b"\n3,d\n", ["a"], "the lines after it are left out, too"),
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
