"""Damaged, hostile and unusual inputs: skipped, named, counted by kind, fatal with strict; memory stays bounded."""

import csv
import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.data import documents
from hymba_lightning.data.documents import DocumentReader, unescaped
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, InputFile, find_inputs
from hymba_lightning.data.paths import find_paths
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.skips import Skips, shown, skip_lines
from hymba_lightning.data.streams import SourceError, bounded_lines, read_blocks
from hymba_lightning.data.tokenizer import train_tokenizer

TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(40)) for number in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_tokenizer(TEXTS, 300))
    return str(path)


def run(source, out, tokenizer, **arguments):
    return prepare(
        [str(source)],
        **({"out": str(out), "tokenizer": tokenizer, "val_fraction": 0.3, "workers": 1, "progress": False} | arguments),
    )


def read(path: Path, strict=False, **arguments):
    """Texts of a file, and what was skipped."""
    reader = DocumentReader(
        [InputFile(path, path.name)],
        arguments.pop("text_key", "text"),
        arguments.pop("separator", None),
        Skips(strict),
        **arguments,
    )
    return [document.text for document in reader], reader.skips.state()


def only_kind(state):
    (kind,) = state["kinds"]
    return kind


def zstd_of(content: bytes, frames: int = 1) -> bytes:
    step = -(-len(content) // frames)
    return b"".join(zstandard.compress(content[start : start + step]) for start in range(0, len(content), step))


# Compressed streams ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_noticed_or_harmless(tmp_path_factory, suffix, data):
    packed = bytearray(
        gzip.compress(LINES) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    )
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("changed") / f"a.jsonl.{suffix}"
    path.write_bytes(packed)
    texts, skipped = read(path)
    # A gzip header's time and flags are no content.
    assert texts == TEXTS or skipped["count"] >= 1


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


# Lines, rows, texts ---------------------------------------------------------------------------------------------------


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
        '{"text": "ü"}'.encode("utf-16"),
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
    path.write_bytes({"gz": gzip.compress, "zst": zstd_of}.get(suffix[-3:].strip("."), bytes)(content))
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


@pytest.mark.slow
def test_a_line_of_a_gigabyte_takes_no_memory(tmp_path):
    packer = zstandard.ZstdCompressor(level=19).compressobj()
    with open(tmp_path / "bomb.jsonl.zst", "wb") as file:
        for _ in range(1000):
            file.write(packer.compress(b"a" * 1_000_000))
        file.write(packer.flush())
    assert (tmp_path / "bomb.jsonl.zst").stat().st_size < 200_000
    code = f"""
import resource
from pathlib import Path
from hymba_lightning.data.streams import bounded_lines, read_blocks
path = Path({str(tmp_path / "bomb.jsonl.zst")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(path, "rb") as raw:
    assert list(bounded_lines(read_blocks(path, raw), 1 << 25)) == [None]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # KiB


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


# Parquet --------------------------------------------------------------------------------------------------------------


def test_parquet_columns_of_all_kinds(tmp_path, tokenizer):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "in").mkdir()
    damaged = arrow.array([b"good", b"\xff\xfe", None, b""]).cast(arrow.binary()).view(arrow.string())
    columns = {
        "damaged": damaged,
        "binary": arrow.array([b"good", b"\xff"]),
        "struct": arrow.array([{"a": "x"}]),
        "list": arrow.array([["a"]]),
        "number": arrow.array([1]),
        "large": arrow.array(["big"], arrow.large_string()),
        "dictionary": arrow.array(["x", "y", "x", None]).dictionary_encode(),
        "empty": arrow.array([], arrow.string()),
    }
    for name, column in columns.items():
        parquet.write_table(arrow.table({"text": column}), tmp_path / "in" / f"{name}.parquet")
    found = {name: read(tmp_path / "in" / f"{name}.parquet") for name in columns}
    assert {name: texts for name, (texts, _) in found.items()} == {
        "damaged": ["good"],
        "binary": ["good"],
        "struct": [],
        "list": [],
        "number": [],
        "large": ["big"],
        "dictionary": ["x", "y", "x"],
        "empty": [],
    }
    assert {name: list(skipped["kinds"]) for name, (_, skipped) in found.items()} == {
        "damaged": ["not UTF-8", "no text"],
        "binary": ["not UTF-8"],
        "struct": ["no text column"],
        "list": ["no text column"],
        "number": ["no text column"],
        "large": [],
        "dictionary": ["no text"],
        "empty": [],
    }
    assert "no texts in column 'text', but struct<a: string>" in found["struct"][1]["first"][0]
    (tmp_path / "in" / "good.jsonl").write_bytes(LINES)
    splits = run(tmp_path / "in", tmp_path / "out", tokenizer).manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == 46
    with pytest.raises(ValueError, match=r"\.parquet.*without strict"):
        run(tmp_path / "in", tmp_path / "strict", tokenizer, strict=True)


def test_a_parquet_file_that_blows_up_costs_itself_only(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    once = arrow.DictionaryArray.from_arrays(arrow.array([0] * 600), arrow.array(["x" * 40_000_000]))
    parquet.write_table(arrow.table({"text": once}), tmp_path / "a.parquet", compression="zstd")
    texts, skipped = read(tmp_path / "a.parquet")
    assert texts == []
    assert only_kind(skipped) in ("too long", "too much memory")
    assert max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) < 2_500_000  # KiB


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw[:40] + bytes(60) + raw[100:],
        lambda raw: b"",
        lambda raw: raw[:-8] + b"\xff\xff\xff\x7fPAR1",
    ],
)
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "a.parquet", compression="gzip")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    texts, skipped = read(tmp_path / "a.parquet")
    assert texts == []
    assert (skipped["count"], only_kind(skipped)) == (1, "corrupt Parquet")


# Data sets of the hub -------------------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read_and_a_failure_tells_its_cause(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": TEXTS[:30]}),
            "test": datasets.Dataset.from_dict({"text": TEXTS[30:]}),
        }
    )
    both.save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    for name, count in (("both", 30), ("both:test", 10), ("one", 30)):
        manifest = run(f"hf:{tmp_path}/{name}", tmp_path / f"out-{name}", tokenizer).manifest
        assert sum(split["documents"] for split in manifest["splits"].values()) == count
    for name, cause in (("both:tset", "it has no split 'tset', but train, test"), ("nowhere", "cannot be read")):
        with pytest.raises(ValueError, match=rf"hf:{tmp_path}/{name}.*{cause}"):
            run(f"hf:{tmp_path}/{name}", tmp_path / "none", tokenizer)
    with pytest.raises(ValueError, match=r"hf:no/such cannot be read: .*(offline|reach|connect|found)"):
        run("hf:no/such", tmp_path / "none", tokenizer)


# Which files ----------------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once_and_loops_do_no_harm(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("b")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.txt").write_text("a")
    for link, target in (
        ("far", tmp_path / "far"),
        ("again", tmp_path / "far"),
        ("loop", tmp_path / "in"),
        ("deep/up", ".."),
        ("aaa", "deep"),
    ):
        (tmp_path / "in" / link).symlink_to(target)
    (tmp_path / "in" / "file.txt").symlink_to(tmp_path / "far" / "b.txt")
    (tmp_path / "in" / "broken.txt").symlink_to("nowhere")
    skips = Skips()
    files = find_inputs([str(tmp_path / "in")], EXCLUDED_FOLDERS, 0, tmp_path / "out", skips)
    assert len(files) == 2
    assert {file.path.resolve().name for file in files} == {"a.txt", "b.txt"}
    assert "deep/a.txt" in {file.key for file in files}
    assert list(skips.state()["kinds"]) == ["cannot be opened"]


def test_what_is_not_read_is_counted_by_kind(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
    for name in ("1.pdf", "2.PDF", "3.png", "LICENSE", ".hidden", "x.jsonl.bz2"):
        (tmp_path / "in" / name).write_text("x")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    summary = run(tmp_path / "in", tmp_path / "out", tokenizer)
    kinds = {kind: entry["count"] for kind, entry in summary.manifest["skipped"]["kinds"].items()}
    assert kinds == {
        ".pdf file, which is not read": 2,
        ".png file, which is not read": 1,
        "not a file": 1,
        ".bz2 file, which is not read": 1,
        "file without a suffix, which is not read": 1,
    }
    assert "2 × .pdf file, which is not read: " in str(summary)
    with pytest.raises(ValueError, match="which is not read"):
        run(tmp_path / "in", tmp_path / "strict", tokenizer, strict=True)


def test_a_name_that_is_not_utf8_is_skipped_and_shown(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
    strange = os.fsencode(tmp_path / "in") + b"/gr\xf6\xdfe\x1b[31m.txt"
    Path(os.fsdecode(strange)).write_text("text")
    summary = run(tmp_path / "in", tmp_path / "out", tokenizer)
    assert list(summary.manifest["skipped"]["kinds"]) == ["file name is not UTF-8"]
    print(summary)
    assert r"gr\xf6\xdfe\x1b[31m.txt: its name is not UTF-8; rename it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        run(tmp_path / "in", tmp_path / "strict", tokenizer, strict=True)
    assert shown("a\nb\x1b") == r"a\nb\x1b"


@pytest.mark.parametrize("folder", ["run[1]", "a*b", "what?", "[!x]", "{a,b}"])
def test_paths_are_paths_and_patterns_only_where_none_exists(tmp_path, tokenizer, folder):
    for name in (folder, "run1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(LINES)
    assert find_paths(folder, tmp_path) == [tmp_path / folder]
    assert find_paths(f"{folder}/*.jsonl", tmp_path) == [tmp_path / folder / "a.jsonl"]
    assert find_paths(str(tmp_path / folder / "**" / "*.jsonl")) == [tmp_path / folder / "a.jsonl"]
    out = tmp_path / "data[2]"
    assert run(tmp_path / folder, out, tokenizer).out == out
    from hymba_lightning.data.datamodule import HymbaDataModule

    HymbaDataModule(str(out), seq_len=16).setup("fit")
    assert find_paths("run[1-3]", tmp_path)[-1].name == ("run[1]" if folder == "run[9]" else "run1")
    assert find_paths("none*", tmp_path) == []


# Helper processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, ":", "."])
def test_workers_import_nothing_from_the_current_directory(tmp_path, tokenizer, path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
    for module in ("queue", "random", "sentencepiece", "pickle", "importlib"):
        (tmp_path / f"{module}.py").write_text("open('executed', 'w').close(); raise SystemExit('executed')")
    code = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
        "from hymba_lightning.data.text_encoder import EncoderPool, TextPiece\nfrom pathlib import Path\n"
        f"import os; os.chdir({str(tmp_path)!r}); sys.path.insert(0, '')\n"
        f"pool = EncoderPool(Path({tokenizer!r}), 2).__enter__()\n"
        "print(pool.submit([TextPiece(True, 'a')]).result()[0]); pool.__exit__(None, None, None)"
    )
    environment = os.environ | ({} if path is None else {"PYTHONPATH": os.environ.get("PYTHONPATH", "") + path})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
    assert not (tmp_path / "executed").exists()


def test_skips_stay_small_however_many_they_are():
    skips = Skips()
    for number in range(5000):
        skips.add("odd" if number % 2 else "even", f"file {number}")
    state = skips.state()
    assert len(json.dumps(state)) < 1000
    lines = skip_lines(state)
    assert lines[0] == "  skipped 5,000:"
    assert "    2,500 × even: file 0; file 2; file 4; …" in lines
    assert skip_lines({"count": 3, "first": ["a", "b"]})[1] == "    3 × could not be read: a; b; …"  # an older manifest


def test_noise_never_passes_for_an_error_of_ours(tmp_path):
    noise = random.Random(0)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "txt", "tsv.zst"):
        for _ in range(150):
            content = noise.randbytes(noise.randrange(200))
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            read(path, max_bytes=noise.choice([8, 1 << 20]))
    with pytest.raises(SourceError):
        list(read_blocks(Path("a.gz"), io.BytesIO(b"no gzip")))
