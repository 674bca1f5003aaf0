"""Text in, data set out: nothing lost, nothing in both splits, the same whatever the workers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import documents, file_digests, prepare_words, tokens, words_text

from hymba_lightning.data import corpus, text_encoder
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.documents import Document, split_rank
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.text_encoder import EncoderPool, TextPiece
from hymba_lightning.data.tokenizer import file_sha256, load_tokenizer

CHALLENGE_TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"


def test_every_document_is_in_one_split_and_decodes_to_itself(tmp_path: Path, texts: dict[str, str]) -> None:
    summary = prepare_words(tmp_path, shard_tokens=3000)
    out = tmp_path / "out"
    train, val = documents(out, "train"), documents(out, "val")
    assert sorted(train + val) == sorted(texts.values())
    assert 1 <= len(val) < len(train)
    splits = summary.manifest["splits"]
    for split, found in (("train", train), ("val", val)):
        assert splits[split]["documents"] == len(found)
        assert splits[split]["text_bytes"] == sum(len(text.encode()) for text in found)
        assert splits[split]["tokens"] == sum(shard["tokens"] for shard in splits[split]["shards"])
        for shard in splits[split]["shards"]:
            assert shard["sha256"] == file_sha256(out / shard["file"])
    assert len(splits["train"]["shards"]) > 1
    assert splits["val"]["counted_bytes"] == splits["val"]["text_bytes"]
    assert json.loads((out / "manifest.json").read_text()) == summary.manifest
    assert f"{len(val)} documents" in str(summary)


def test_unigram_score_is_that_of_smoothed_training_frequencies(tmp_path: Path, texts: dict[str, str]) -> None:
    summary = prepare_words(tmp_path, shard_tokens=3000)
    train, val = tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")
    counts = np.bincount(train, minlength=330)
    assert summary.manifest["train_token_counts"] == counts.tolist()
    probabilities = (counts + 1) / (len(train) + 330)
    bits = -np.log2(probabilities[val[1:]]).sum()
    expected = bits / summary.manifest["splits"]["val"]["text_bytes"]
    assert summary.manifest["unigram_bpb"] == pytest.approx(expected)
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=16)
    assert data.unigram_bpb == pytest.approx(expected)
    limited = HymbaDataModule(str(tmp_path / "out"), seq_len=16, val_tokens_limit=100)
    assert limited.unigram_bpb != pytest.approx(expected)
    # Those of other shards than are trained on are not known.
    assert len(list((tmp_path / "out").glob("*_train_00000[12].bin"))) == 2
    part = HymbaDataModule(str(tmp_path / "out"), seq_len=16, train_files="*_train_00000[12].bin")
    assert part.unigram_bpb is None


def test_data_module_reads_what_was_prepared(tmp_path: Path, texts: dict[str, str]) -> None:
    prepare_words(tmp_path)
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=16)
    data.setup("fit")
    assert (data.vocab_size, data.bos_id) == (330, 1)
    assert data.train_batch(0).inputs[0, 0] == data.val_stream()[:1] == 1
    with pytest.raises(ValueError, match=r"sp1024\.model is not the tokenizer that made the shards"):
        HymbaDataModule(str(tmp_path / "out"), str(CHALLENGE_TOKENIZER), seq_len=16).setup("fit")


def test_damaged_data_are_refused_before_training(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    prepare_words(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
    first = tmp_path / "out" / "text_train_000000.bin"
    write_shard(first, np.arange(10))
    with pytest.raises(ValueError, match=r"text_train_000000\.bin has 1044 bytes, its manifest says 7024"):
        HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")
    first.unlink()
    with pytest.raises(ValueError, match=r"text_train_000000\.bin is missing from the train data"):
        HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")
    HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("test")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
        HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("test")


def test_workers_and_a_second_run_change_nothing(tmp_path: Path, texts: dict[str, str], monkeypatch) -> None:
    monkeypatch.setattr(corpus, "TASK_CHARS", 2000)
    monkeypatch.setattr(text_encoder, "PIECE_CHARS", 100)
    first = prepare_words(tmp_path, out=str(tmp_path / "one"))
    second = prepare_words(tmp_path, out=str(tmp_path / "two"), workers=2)
    assert file_digests(tmp_path / "one") == file_digests(tmp_path / "two")
    assert not first.up_to_date
    assert not second.up_to_date


def test_split_depends_on_a_documents_content_only(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    copies = tmp_path / "in" / "copies"
    copies.mkdir()
    for seed in range(0, 40, 2):
        (copies / f"again{seed}.md").write_text(words_text(seed))
    for seed in range(100, 130):
        (copies / f"new{seed}.md").write_text(words_text(seed))
    prepare_words(tmp_path, out=str(tmp_path / "more"), tokenizer=tokenizer)
    train, val = set(documents(tmp_path / "more", "train")), set(documents(tmp_path / "more", "val"))
    assert not train & val
    (tmp_path / "in" / "copies").rename(tmp_path / "elsewhere")
    prepare_words(tmp_path, tokenizer=tokenizer)
    assert set(documents(tmp_path / "out", "val")) <= val
    prepare_words(tmp_path, out=str(tmp_path / "other"), tokenizer=tokenizer, seed=1)
    assert documents(tmp_path / "other", "val") != documents(tmp_path / "out", "val")


def test_tokenizer_is_trained_on_training_documents_only(tmp_path: Path, texts: dict[str, str]) -> None:
    marked = {"train": "Ж", "val": "Ω"}
    for name, text in texts.items():
        for length in range(100, 1000):
            document = {split: text + letter * length for split, letter in marked.items()}
            ranks = {split: split_rank(Document(full, full.encode()), 0) for split, full in document.items()}
            split = "val" if ranks["val"] < 0.2 else "train"
            if split == "val" or ranks["train"] >= 0.2:
                next((tmp_path / "in").rglob(name)).write_bytes(document[split].encode())
                break
    prepare_words(tmp_path)
    assert all("Ω" in text for text in documents(tmp_path / "out", "val"))
    assert all("Ж" in text for text in documents(tmp_path / "out", "train"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.piece_to_id("Ж") != tokenizer.unk_id()
    assert tokenizer.piece_to_id("Ω") == tokenizer.unk_id()


@pytest.mark.parametrize("packing", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path: Path, tokenizer: str, packing: str) -> None:
    wanted = [words_text(seed, 30) for seed in range(25)]
    lines = [json.dumps({"body": text, "text": 3}) for text in wanted]
    # A line that is no JSON, one without the field, one that cannot be UTF-8, an empty document, an empty line.
    lines[3:3] = ["{", json.dumps({"x": 1}), json.dumps({"body": "\ud800"}), json.dumps({"body": ""}), ""]
    raw = "\n".join(lines).encode()
    halves = raw[:400], raw[400:]
    pack = {
        "jsonl": lambda: raw,
        "jsonl.gz": lambda: gzip.compress(halves[0]) + gzip.compress(halves[1]),
        "jsonl.zst": lambda: b"".join(zstandard.compress(half) for half in halves),
    }[packing]
    file = tmp_path / f"books.{packing}"
    file.write_bytes(pack())
    summary = prepare_words(tmp_path, [str(file)], text_key="body", tokenizer=tokenizer)
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted(found) == sorted(wanted)
    assert summary.manifest["skipped"]["count"] == 3
    assert f"books.{packing}:4: no text under 'body'" in str(summary)
    with pytest.raises(ValueError, match=rf"books\.{packing}:4: .*without strict"):
        prepare_words(tmp_path, [str(file)], text_key="body", tokenizer=tokenizer, out=str(tmp_path / "s"), strict=True)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=12, max_size=30, unique=True))
@settings(max_examples=15, deadline=None)
def test_any_documents_survive(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, wanted: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    summary = prepare_words(folder, [str(folder / "a.jsonl")], tokenizer=tokenizer, val_fraction=0.5)
    assert sorted(documents(folder / "out", "train") + documents(folder / "out", "val")) == sorted(wanted)
    val = summary.manifest["splits"]["val"]
    assert val["counted_bytes"] == val["text_bytes"]


def test_separator_cuts_a_file_into_documents(tmp_path: Path, tokenizer: str) -> None:
    wanted = [f"chapter {i}\n" for i in range(20)]
    (tmp_path / "book.txt").write_text("<end>".join(wanted))
    prepare_words(tmp_path, [str(tmp_path / "book.txt")], separator="<end>", tokenizer=tokenizer)
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == sorted(wanted)


def test_unreadable_files_are_counted_and_named(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    (tmp_path / "in" / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "in" / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    summary = prepare_words(tmp_path, tokenizer=tokenizer)
    assert summary.manifest["skipped"]["count"] == 2
    named = "\n".join(summary.manifest["skipped"]["first"])
    assert "latin.txt: not UTF-8 text (invalid start byte at byte 2)" in named
    assert "cut.jsonl.gz: " in named
    with pytest.raises(ValueError, match=r"latin\.txt|cut\.jsonl"):
        prepare_words(tmp_path, tokenizer=tokenizer, out=str(tmp_path / "strict"), strict=True)
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_challenge_tokenizers_losses_are_reported(tmp_path: Path, texts: dict[str, str]) -> None:
    summary = prepare_words(tmp_path, tokenizer=str(CHALLENGE_TOKENIZER))
    val = summary.manifest["splits"]["val"]
    assert val["counted_bytes"] < val["text_bytes"]
    assert "does not keep all of the text" in str(summary)
    assert summary.manifest["tokenizer"]["sha256"] == file_sha256(CHALLENGE_TOKENIZER)


def test_memory_is_bounded_by_the_requests_in_flight(tmp_path: Path, texts, tokenizer: str, monkeypatch) -> None:
    waiting, most = set(), 0

    class CountingPool(EncoderPool):
        def submit(self, pieces: list[TextPiece]) -> Any:
            nonlocal most
            future = super().submit(pieces)
            waiting.add(future)
            most = max(most, len(waiting))
            result = future.result
            future.result = lambda: (waiting.discard(future), result())[1]
            return future

    monkeypatch.setattr(corpus, "TASK_CHARS", 500)
    monkeypatch.setattr(text_encoder, "PIECE_CHARS", 100)
    monkeypatch.setattr(corpus, "EncoderPool", CountingPool)
    prepare_words(tmp_path, tokenizer=tokenizer)
    assert sum(map(len, texts.values())) > 100 * 500
    assert most == corpus.TASKS_PER_WORKER + 1


def test_killed_encoder_is_reported(tokenizer: str) -> None:
    with EncoderPool(Path(tokenizer), 2) as pool:
        for future in [pool.submit([TextPiece(True, "a")]) for _ in range(4)]:
            assert future.result().tolist()[0] == 1
        for worker in pool._workers:
            worker.process.kill()
            worker.process.wait()
        failed = pool.submit([TextPiece(True, "b")])
        with pytest.raises(RuntimeError, match=r"ended with status -9; .*fewer workers"):
            failed.result()


def test_encoder_processes_import_neither_torch_nor_lightning() -> None:
    """They start once per core; with torch each would take seconds and hundreds of megabytes."""
    code = "import sys, hymba_lightning.data.prepare; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
