"""Parquet files and Hugging Face data sets as inputs, and `prepare` that goes on after an interruption."""

import builtins
import json
import time
from pathlib import Path

import injected
import pytest
from fit_process import finish, start, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS

from hymba_lightning.data import corpus
from hymba_lightning.data.prepare import prepare


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """Four files of fifteen documents, some lines of which cannot be read."""
    folder = tmp_path_factory.mktemp("in")
    for index in range(4):
        lines = [json.dumps({"text": text}) for text in TEXTS[15 * index : 15 * (index + 1)]]
        (folder / f"{index}.jsonl").write_text("\n".join([*lines[:7], "{broken", *lines[7:]]) + "\n")
    return folder


def run(source, out: Path, tokenizer: str, **arguments):
    return prepare(
        [str(source)],
        **(
            {
                "out": str(out),
                "tokenizer": tokenizer,
                "val_fraction": 0.3,
                "workers": 1,
                "shard_tokens": 700,
                "progress": False,
            }
            | arguments
        ),
    )


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.bin")}


# Interrupted ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(stops=st.lists(st.integers(0, 59), min_size=1, max_size=3))
def test_interrupted_anywhere_it_goes_on_to_the_same_shards(tmp_path_factory, jsonl, tokenizer, stops):
    out = tmp_path_factory.mktemp("out")
    whole = run(jsonl, out / "whole", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SAVE_SECONDS", 0.0)
        original = corpus.split_rank
        for stop in stops:
            left = stop

            def interrupt(document, seed):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return original(document, seed)

            patch.setattr(corpus, "split_rank", interrupt)
            try:
                run(jsonl, out / "cut", tokenizer)
                break
            except KeyboardInterrupt:
                pass
    cut = run(jsonl, out / "cut", tokenizer)
    assert shards(out / "cut") == shards(out / "whole")
    assert cut.manifest == whole.manifest
    assert cut.manifest["skipped"]["count"] == 4
    assert not (out / "cut" / ".partial").exists()


def test_killed_it_goes_on_to_the_same_shards(tmp_path, jsonl, tokenizer):
    whole = run(jsonl, tmp_path / "whole", tokenizer)
    arguments = [
        "prepare",
        str(jsonl),
        "--out",
        str(tmp_path / "cut"),
        "--tokenizer",
        tokenizer,
        "--val_fraction",
        "0.3",
        "--shard_tokens",
        "700",
        "--workers",
        "2",
    ]
    progress = tmp_path / "cut" / ".partial" / "progress.json"
    documents = []
    for _ in range(2):
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        process = start(arguments, tmp_path / "log", hook=injected.prepare_saves_often)
        wait_for(lambda before=before: progress.exists() and progress.stat().st_mtime_ns > before)
        time.sleep(0.05)
        process.kill()
        process.join()
        splits = json.loads(progress.read_bytes())["splits"]
        documents.append(sum(split["documents"] for split in splits.values()))
    assert 0 < documents[0] < documents[1] < 60
    assert finish([start(arguments, tmp_path / "log", hook=injected.prepare_saves_often)]) == [0]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_bytes())
    assert manifest["splits"] == whole.manifest["splits"]


def test_other_arguments_start_anew(tmp_path, jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    original, left = corpus.split_rank, 40

    def interrupt(document, seed):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(document, seed)

    monkeypatch.setattr(corpus, "split_rank", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(jsonl, tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / ".partial" / "progress.json").is_file()
    monkeypatch.setattr(corpus, "split_rank", original)
    run(jsonl, tmp_path / "out", tokenizer, seed=3)
    run(jsonl, tmp_path / "fresh", tokenizer, seed=3)
    assert shards(tmp_path / "out") == shards(tmp_path / "fresh")


@settings(max_examples=25, deadline=None)
@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=6))
def test_any_bytes_among_the_lines_are_skipped_or_read(tmp_path_factory, tokenizer, lines):
    folder = tmp_path_factory.mktemp("any")
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:8]]
    (folder / "a.jsonl").write_bytes(b"\n".join([*good[:4], *lines, *good[4:]]))
    manifest = run(folder, folder / "out", tokenizer, val_fraction=0.5).manifest
    documents = sum(split["documents"] for split in manifest["splits"].values())
    assert documents >= 8
    assert documents + manifest["skipped"]["count"] <= 8 + len([line for line in lines if line.strip()])


# Parquet and the hub ----------------------------------------------------------------------------------------------


def test_parquet_rows_are_documents(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "in").mkdir()
    rows = [*TEXTS[:30], None, *TEXTS[30:]]
    parquet.write_table(
        pyarrow.table({"body": rows, "other": list(range(61))}), tmp_path / "in" / "a.parquet", row_group_size=7
    )
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 is not enough")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "in" / "c.parquet")
    manifest = run(tmp_path / "in", tmp_path / "out", tokenizer, text_key="body").manifest
    splits = manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == 60
    assert sum(split["text_bytes"] for split in splits) == sum(map(len, TEXTS))
    skipped = "\n".join(manifest["skipped"]["first"])
    assert manifest["skipped"]["count"] == 3
    for part in (
        "a.parquet, row 31: no text under 'body'",
        "b.parquet: no Parquet file",
        "c.parquet: no column 'body' among text; set text_key",
    ):
        assert part in skipped
    with pytest.raises(ValueError, match="set text_key"):
        run(tmp_path / "in" / "c.parquet", tmp_path / "strict", tokenizer, text_key="body", strict=True)


def test_a_hugging_face_data_set_is_an_input(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, texts in (("train", TEXTS[:50]), ("test", TEXTS[50:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    manifest = run(f"hf:{folder}", tmp_path / "out", tokenizer).manifest
    assert sum(split["documents"] for split in manifest["splits"].values()) == 50
    manifest = run(f"hf:{folder}:test", tmp_path / "test", tokenizer).manifest
    assert sum(split["documents"] for split in manifest["splits"].values()) == 10
    with pytest.raises(ValueError, match=r"no column 'body' among text"):
        run(f"hf:{folder}", tmp_path / "none", tokenizer, text_key="body", strict=True)


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("hf:some/where", "datasets")])
def test_a_missing_package_is_named_with_its_command(tmp_path, tokenizer, monkeypatch, source, package):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    absent = {"import_module": staticmethod(lambda name: builtins.__import__(f"no_such_{name}"))}
    monkeypatch.setattr("hymba_lightning.data.sources.importlib", type("Absent", (), absent))
    source = source if source.startswith("hf:") else tmp_path / source
    with pytest.raises(ImportError, match=rf"needs the package {package}.*pip install \"hymba-lightning\[data\]\""):
        run(source, tmp_path / "out", tokenizer)
