"""Parquet files and data sets of the hub: columns of all kinds, damage, what is missing."""

import io
import resource
import subprocess
import sys

import pytest
from prepared import TEXTS, json_lines, only_kind, read, run

from hymba_lightning.data.sources import answered_rows
from hymba_lightning.data.streams import SourceError

TEXTS = TEXTS[:40]
LINES = json_lines(TEXTS)


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


def test_what_a_parquet_file_may_take_is_limited(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.table({"text": ["x" * 300_000_000]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    code = (
        "import sys, hymba_lightning.data.parquet as reader\n"
        f"reader.MEMORY_BYTES = 100 << 20; reader.answer({str(tmp_path / 'a.parquet')!r}, 'text', 1 << 25, "
        "sys.stdout.buffer)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    with pytest.raises(SourceError, match=r"needs more than 100 MiB|needs too much memory"):
        list(answered_rows(io.BytesIO(done.stdout), lambda: done.returncode))


def test_of_two_columns_of_one_name_none_is_taken(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    texts, skipped = read(tmp_path / "a.parquet")
    assert (texts, only_kind(skipped)) == ([], "no text column")
    assert "2 columns 'text'; give one of them another name" in skipped["first"][0]


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
    with pytest.raises(ValueError, match="hf: names no data set"):
        run("hf:", tmp_path / "none", tokenizer)
    with pytest.raises(ValueError, match=r"hf:no/such cannot be read: .*(offline|reach|connect|found)"):
        run("hf:no/such", tmp_path / "none", tokenizer)
