"""Text in, data set out: nothing lost, nothing in both splits, the same whatever the workers, whole or not there."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.data import corpus, shards, text_encoder
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.documents import Document, split_rank
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, find_inputs
from hymba_lightning.data.prepare import PrepareSummary, prepare
from hymba_lightning.data.shards import Shard, find_shards, write_shard
from hymba_lightning.data.text_encoder import EncoderPool, TextPiece
from hymba_lightning.data.tokenizer import file_sha256, load_tokenizer, train_tokenizer

CHALLENGE_TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"
WORDS = ["def", "return", "ångström", "if", "width", "height", "(x)", "\n    ", "  ", "日本", "▁", "1,234", "\t", "'''"]


def _text(seed: int, n_words: int = 300) -> str:
    random = np.random.default_rng(seed)
    return f"# document {seed}\n" + " ".join(random.choice(WORDS, n_words))


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Forty files in two folders."""
    written = {}
    for seed in range(40):
        path = tmp_path / "in" / ("deep/er" if seed % 2 else "") / f"file{seed}.{'py' if seed % 3 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_text(seed).encode())
        written[path.name] = _text(seed)
    return written


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_tokenizer([_text(seed) for seed in range(30)], 320))
    return str(path)


def _prepare(tmp_path: Path, inputs: list[str] | None = None, **arguments: Any) -> PrepareSummary:
    defaults = {"out": str(tmp_path / "out"), "vocab_size": 330, "val_fraction": 0.2, "workers": 1, "progress": False}
    return prepare([str(tmp_path / "in")] if inputs is None else inputs, **(defaults | arguments))


def _tokens(out: Path, split: str) -> list[int]:
    opened = [Shard(path) for path in find_shards(f"*_{split}_*.bin", out)]
    return [token for shard in opened for token in shard.read(0, shard.n_tokens).tolist()]


def _documents(out: Path, split: str) -> list[str]:
    """Texts of a split, decoded from the shards."""
    processor = load_tokenizer(out / "tokenizer.model")
    cut: list[list[int]] = []
    for token in _tokens(out, split):
        if token == processor.bos_id():
            cut.append([])
        else:
            cut[-1].append(token)
    return [processor.decode(ids) for ids in cut]


def _files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir() if not path.name.startswith(".")}


def test_every_document_is_in_one_split_and_decodes_to_itself(tmp_path: Path, texts: dict[str, str]) -> None:
    summary = _prepare(tmp_path, shard_tokens=3000)
    out = tmp_path / "out"
    train, val = _documents(out, "train"), _documents(out, "val")
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
    summary = _prepare(tmp_path)
    train, val = _tokens(tmp_path / "out", "train"), _tokens(tmp_path / "out", "val")
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


def test_data_module_reads_what_was_prepared(tmp_path: Path, texts: dict[str, str]) -> None:
    _prepare(tmp_path)
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=16)
    data.setup("fit")
    assert (data.vocab_size, data.bos_id) == (330, 1)
    assert data.train_batch(0).inputs[0, 0] == data.val_stream()[:1] == 1
    with pytest.raises(ValueError, match=r"sp1024\.model is not the tokenizer that made the shards"):
        HymbaDataModule(str(tmp_path / "out"), str(CHALLENGE_TOKENIZER), seq_len=16).setup("fit")


def test_damaged_data_are_refused_before_training(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    _prepare(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
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
    first = _prepare(tmp_path, out=str(tmp_path / "one"))
    second = _prepare(tmp_path, out=str(tmp_path / "two"), workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert not first.up_to_date
    assert not second.up_to_date


def test_split_depends_on_a_documents_content_only(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    copies = tmp_path / "in" / "copies"
    copies.mkdir()
    for seed in range(0, 40, 2):
        (copies / f"again{seed}.md").write_text(_text(seed))
    for seed in range(100, 130):
        (copies / f"new{seed}.md").write_text(_text(seed))
    _prepare(tmp_path, out=str(tmp_path / "more"), tokenizer=tokenizer)
    train, val = set(_documents(tmp_path / "more", "train")), set(_documents(tmp_path / "more", "val"))
    assert not train & val
    (tmp_path / "in" / "copies").rename(tmp_path / "elsewhere")
    _prepare(tmp_path, tokenizer=tokenizer)
    assert set(_documents(tmp_path / "out", "val")) <= val
    _prepare(tmp_path, out=str(tmp_path / "other"), tokenizer=tokenizer, seed=1)
    assert _documents(tmp_path / "other", "val") != _documents(tmp_path / "out", "val")


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
    _prepare(tmp_path)
    assert all("Ω" in text for text in _documents(tmp_path / "out", "val"))
    assert all("Ж" in text for text in _documents(tmp_path / "out", "train"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.piece_to_id("Ж") != tokenizer.unk_id()
    assert tokenizer.piece_to_id("Ω") == tokenizer.unk_id()


@pytest.mark.parametrize("packing", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path: Path, tokenizer: str, packing: str) -> None:
    wanted = [_text(seed, 30) for seed in range(25)]
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
    summary = _prepare(tmp_path, [str(file)], text_key="body", tokenizer=tokenizer)
    found = _documents(tmp_path / "out", "train") + _documents(tmp_path / "out", "val")
    assert sorted(found) == sorted(wanted)
    assert summary.manifest["skipped"]["count"] == 3
    assert f"books.{packing}:4: no text under 'body'" in str(summary)
    with pytest.raises(ValueError, match=rf"books\.{packing}:4: .*without strict"):
        _prepare(tmp_path, [str(file)], text_key="body", tokenizer=tokenizer, out=str(tmp_path / "s"), strict=True)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=12, max_size=30, unique=True))
@settings(max_examples=15, deadline=None)
def test_any_documents_survive(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, wanted: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    summary = _prepare(folder, [str(folder / "a.jsonl")], tokenizer=tokenizer, val_fraction=0.5)
    assert sorted(_documents(folder / "out", "train") + _documents(folder / "out", "val")) == sorted(wanted)
    val = summary.manifest["splits"]["val"]
    assert val["counted_bytes"] == val["text_bytes"]


def test_separator_cuts_a_file_into_documents(tmp_path: Path, tokenizer: str) -> None:
    wanted = [f"chapter {i}\n" for i in range(20)]
    (tmp_path / "book.txt").write_text("<end>".join(wanted))
    _prepare(tmp_path, [str(tmp_path / "book.txt")], separator="<end>", tokenizer=tokenizer)
    assert sorted(_documents(tmp_path / "out", "train") + _documents(tmp_path / "out", "val")) == sorted(wanted)


def test_unreadable_files_are_counted_and_named(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    (tmp_path / "in" / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "in" / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    summary = _prepare(tmp_path, tokenizer=tokenizer)
    assert summary.manifest["skipped"]["count"] == 2
    named = "\n".join(summary.manifest["skipped"]["first"])
    assert "latin.txt: not UTF-8 text (invalid start byte at byte 2)" in named
    assert "cut.jsonl.gz: " in named
    with pytest.raises(ValueError, match=r"latin\.txt|cut\.jsonl"):
        _prepare(tmp_path, tokenizer=tokenizer, out=str(tmp_path / "strict"), strict=True)
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_challenge_tokenizers_losses_are_reported(tmp_path: Path, texts: dict[str, str]) -> None:
    summary = _prepare(tmp_path, tokenizer=str(CHALLENGE_TOKENIZER))
    val = summary.manifest["splits"]["val"]
    assert val["counted_bytes"] < val["text_bytes"]
    assert "does not keep all of the text" in str(summary)
    assert summary.manifest["tokenizer"]["sha256"] == file_sha256(CHALLENGE_TOKENIZER)


# Again, otherwise, interrupted ----------------------------------------------------------------------------------------


def test_same_again_does_nothing_and_says_so(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    _prepare(tmp_path, tokenizer=tokenizer)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = _prepare(tmp_path, tokenizer=tokenizer, workers=2, overwrite=True)
    assert again.up_to_date
    assert "is up to date" in str(again)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_data_are_replaced_only_on_demand(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    out = tmp_path / "out"
    _prepare(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
    before = _files(out)
    with pytest.raises(FileExistsError, match="made with another shard_tokens; choose another folder, or pass overwr"):
        _prepare(tmp_path, tokenizer=tokenizer)
    next((tmp_path / "in").glob("*.txt")).write_text("changed")
    with pytest.raises(FileExistsError, match="made with another files"):
        _prepare(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
    assert _files(out) == before
    _prepare(tmp_path, tokenizer=tokenizer, overwrite=True)
    assert set(_files(out)) == {"manifest.json", "tokenizer.model", "text_train_000000.bin", "text_val_000000.bin"}
    assert not (out / ".partial").exists()
    (out / "text_val_000000.bin").unlink()
    with pytest.raises(FileExistsError, match=r"text_val_000000\.bin is missing; .* pass overwrite"):
        _prepare(tmp_path, tokenizer=tokenizer)
    _prepare(tmp_path, tokenizer=tokenizer, name="renamed", overwrite=True)
    assert not list(out.glob("text_*"))
    (out / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="holds data without a manifest"):
        _prepare(tmp_path, tokenizer=tokenizer, name="renamed")
    with pytest.raises(FileExistsError, match=r"shards of other data \(renamed_train_000000\.bin\)"):
        _prepare(tmp_path, tokenizer=tokenizer, overwrite=True)


def test_interrupted_run_leaves_the_old_data_whole(tmp_path: Path, texts, tokenizer: str, monkeypatch) -> None:
    _prepare(tmp_path, tokenizer=tokenizer)
    before = _files(tmp_path / "out")

    def full_disk(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._ShardFile, "commit", full_disk)
    with pytest.raises(OSError, match="No space left"):
        _prepare(tmp_path, tokenizer=tokenizer, seed=5, overwrite=True)
    assert _files(tmp_path / "out") == before
    with pytest.raises(OSError, match="No space left"):
        _prepare(tmp_path, tokenizer=tokenizer, out=str(tmp_path / "new"))
    assert _files(tmp_path / "new") == {}
    assert not (tmp_path / "new" / ".partial").exists()


def test_an_installation_that_began_is_finished_by_the_next_call(tmp_path, texts, tokenizer: str, monkeypatch) -> None:
    _prepare(tmp_path, tokenizer=tokenizer)
    move = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name.startswith("text_val"):
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        # A stand-in for the module, since shards.py moves its finished files with os.replace too.
        stand_in = {"replace": staticmethod(interrupted), "path": os.path}
        patch.setattr("hymba_lightning.data.manifest.os", type("Os", (), stand_in))
        with pytest.raises(KeyboardInterrupt):
            _prepare(tmp_path, tokenizer=tokenizer, seed=5, overwrite=True)
    with pytest.raises(ValueError, match="are being replaced, or were when `hymba prepare` ended"):
        HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")
    # The next call finishes what was decided, whatever it wants itself.
    with pytest.raises(FileExistsError, match="made with another files, seed"):
        _prepare(tmp_path, tokenizer=tokenizer)
    assert _prepare(tmp_path, tokenizer=tokenizer, seed=5).up_to_date
    _prepare(tmp_path, tokenizer=tokenizer, seed=5, out=str(tmp_path / "whole"))
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert not (tmp_path / "out" / ".partial").exists()


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
    _prepare(tmp_path, tokenizer=tokenizer)
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


# What is refused ------------------------------------------------------------------------------------------------------


def test_smallest_fraction_that_would_do_is_named(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"none of the 40 documents fell to validation") as caught:
        _prepare(tmp_path, tokenizer=tokenizer, val_fraction=1e-6)
    fraction = float(str(caught.value).split("raise it to ")[1].split()[0])
    summary = _prepare(tmp_path, tokenizer=tokenizer, val_fraction=fraction)
    assert summary.manifest["splits"]["val"]["documents"] == 1
    with pytest.raises(ValueError, match="all 40 documents fell to validation"):
        _prepare(tmp_path, tokenizer=tokenizer, val_fraction=1 - 1e-9, out=str(tmp_path / "b"))


def test_single_document_is_refused_with_a_remedy(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a b c"}\n{"tex')
    with pytest.raises(ValueError, match=r"hold 1 document .*\(1 could not: .*one\.jsonl:2.*\).*separator.*val_inputs"):
        _prepare(tmp_path, [str(tmp_path / "one.jsonl")], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"val_fraction": 0.0}, ValueError, "val_fraction is 0.0"),
        ({"shard_tokens": 0}, ValueError, "shard_tokens is 0"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"vocab_size": 100}, ValueError, "vocab_size is 100"),
        ({"vocab_size": 60000}, ValueError, "vocab_size=60000"),
        ({"inputs": ["/nowhere/*.txt"]}, FileNotFoundError, r"input '/nowhere/\*\.txt' matches no file"),
        ({"inputs": [str(CHALLENGE_TOKENIZER)]}, ValueError, r"sp1024\.model is of no known kind"),
        ({"tokenizer": "/nowhere/t.model"}, FileNotFoundError, r"no tokenizer at /nowhere/t\.model"),
    ],
)
def test_impossible_arguments(tmp_path: Path, texts: dict[str, str], arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        _prepare(tmp_path, **arguments)


# Which files ----------------------------------------------------------------------------------------------------------


def test_folders_globs_and_exclusions(tmp_path: Path) -> None:
    there = "a.txt b.md c.pdf sub/d.py sub/.git/e.py sub/__pycache__/f.py sub/skip/g.py out/h.md"
    for name in there.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*inputs: str, exclude: tuple[str, ...] = EXCLUDED_FOLDERS) -> set[str]:
        return {file.key for file in find_inputs([str(tmp_path / i) for i in inputs], exclude, 0, tmp_path / "out")}

    assert found("") == {"a.txt", "b.md", "sub/d.py", "sub/skip/g.py"}
    assert found("", exclude=(*EXCLUDED_FOLDERS, "skip", "*.md")) == {"a.txt", "sub/d.py"}
    assert found("**/*.py", "a.txt") == {"a.txt", "d.py", "f.py", "g.py"}
    order = [[f.key for f in find_inputs([str(tmp_path)], (), seed, tmp_path / "out")] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]


def test_python_standard_library_is_an_input(tmp_path: Path) -> None:
    files = find_inputs(["python_stdlib"], EXCLUDED_FOLDERS, 0, tmp_path)
    keys = {file.key for file in files}
    assert {"argparse.py", "json/decoder.py"} <= keys
    assert len(keys) > 300
    assert not {part for key in keys for part in Path(key).parts} & {"test", "tests", "site-packages", "__pycache__"}
    assert sum(os.path.getsize(file.path) for file in files) > 5_000_000


def test_encoder_processes_import_neither_torch_nor_lightning() -> None:
    """They start once per core; with torch each would take seconds and hundreds of megabytes."""
    code = "import sys, hymba_lightning.data.prepare; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
