"""Damaged, replaced and mistaken data: named before the first step, by fit, test and prepare; validation text never
trained on."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_lightning.data import digests
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.inputs import first_common
from hymba_lightning.data.manifest import read_manifest
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.shards import HEADER_BYTES
from hymba_lightning.data.tokenizer import train_tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"
TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(40)) for number in range(40)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder.parent / "t.model").write_bytes(train_tokenizer(TEXTS, 300))
    return folder


def run(source, out, **arguments):
    return prepare(
        [str(source)],
        **(
            {
                "out": str(out),
                "tokenizer": str(source.parent / "t.model"),
                "workers": 1,
                "val_fraction": 0.3,
                "shard_tokens": 900,
                "progress": False,
            }
            | arguments
        ),
    )


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    run(source, out)
    return out


def zero_second_half(path: Path) -> None:
    raw = path.read_bytes()
    half = (HEADER_BYTES + len(raw)) // 2
    path.write_bytes(raw[:half] + bytes(len(raw) - half))


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_half_zeroed_shard_is_named_by_fit_test_and_prepare(source, tmp_path, seen_before, keep_times):
    out = tmp_path / "out"
    run(source, out)
    if seen_before:
        HymbaDataModule(str(out), seq_len=16).setup("fit")
    for split, stages in (("train", ["fit"]), ("val", ["fit", "validate", "test"])):
        path = out / f"text_{split}_000000.bin"
        kept, stat = path.read_bytes(), path.stat()
        zero_second_half(path)
        if keep_times:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for stage in stages:
            with pytest.raises(ValueError, match=rf"{split}_000000\.bin is damaged: its SHA-256 is .*with overwrite"):
                HymbaDataModule(str(out), seq_len=16).setup(stage)
        with pytest.raises(FileExistsError, match=rf"text_{split}_000000\.bin is damaged; .*overwrite"):
            run(source, out)
        path.write_bytes(kept)
    assert run(source, out).up_to_date
    zero_second_half(out / "text_val_000000.bin")
    assert not run(source, out, overwrite=True).up_to_date
    HymbaDataModule(str(out), seq_len=16).setup("fit")


def test_a_damaged_tokenizer_and_shards_elsewhere_are_noticed(source, tmp_path):
    out, far = tmp_path / "out", tmp_path / "far"
    run(source, out)
    shutil.copytree(out, far)
    (far / "text_train_000000.bin").rename(tmp_path / "moved.bin")
    (far / "text_train_000000.bin").symlink_to(tmp_path / "moved.bin")
    elsewhere = {"val_files": str(far / "*_val_*"), "train_files": str(far / "*_train_*"), "seq_len": 16}
    HymbaDataModule(str(out), **elsewhere).setup("fit")
    zero_second_half(tmp_path / "moved.bin")
    with pytest.raises(ValueError, match=r"far/text_train_000000\.bin is damaged"):
        HymbaDataModule(str(out), **elsewhere).setup("fit")
    raw = bytearray((out / "tokenizer.model").read_bytes())
    raw[-10] ^= 1
    (out / "tokenizer.model").write_bytes(raw)
    with pytest.raises(FileExistsError, match=r"tokenizer\.model is damaged"):
        run(source, out)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        HymbaDataModule(str(out), seq_len=16).setup("fit")


def test_after_prepare_nothing_is_hashed_again(source, tmp_path, monkeypatch):
    run(source, tmp_path / "out")
    monkeypatch.setattr(digests, "hash_file", None)
    HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")
    assert run(source, tmp_path / "out").up_to_date
    assert len(HymbaDataModule(str(tmp_path / "out")).data_digest("train")) == 64


def test_data_replaced_while_they_are_opened_are_not_mixed(source, tmp_path, monkeypatch):
    run(source, tmp_path / "out")
    data = HymbaDataModule(str(tmp_path / "out"), seq_len=16)
    opened = data.val_stream

    def opened_too_late():
        run(source, tmp_path / "out", seed=4, overwrite=True)
        return opened()

    monkeypatch.setattr(data, "val_stream", opened_too_late)
    with pytest.raises(ValueError, match="were replaced while they were opened; start again"):
        data.setup("fit")


# The manifest ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_says_the_same(prepared, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("manifest")
    path = out / "manifest.json"
    raw = bytearray((prepared / "manifest.json").read_bytes())
    right = read_manifest(prepared)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        found = read_manifest(out)
    except ValueError:
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(out)
    else:
        assert {key: value for key, value in found.items() if key in right} == {
            key: value for key, value in right.items() if key in found
        }


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["splits"]["val"]["shards"][0].update(file="../../x"),
        lambda manifest: manifest["splits"]["val"]["shards"][0].update(file=7),
        lambda manifest: manifest["splits"].pop("val"),
        lambda manifest: manifest.update(splits=[]),
        lambda manifest: manifest.update(train_token_counts=[-1]),
        lambda manifest: manifest.update(train_token_counts=3),
        lambda manifest: manifest["tokenizer"].update(sha256="x"),
        lambda manifest: manifest.update(arguments=None),
        lambda manifest: manifest["splits"]["train"].update(documents="7"),
        lambda manifest: manifest.update(version=2),
    ],
)
def test_a_manifest_of_another_form_is_refused_and_can_be_replaced(source, tmp_path, change):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(json.dumps(manifest))
    out = tmp_path / "out"
    for use in (lambda: HymbaDataModule(str(out), seq_len=16).setup("fit"), lambda: run(source, out)):
        with pytest.raises(ValueError, match=r"manifest\.json .*prepare the data again"):
            use()
    assert not run(source, tmp_path / "out", overwrite=True).up_to_date


@pytest.mark.parametrize(
    "change",
    [
        {"name": "/"},
        {"name": "../x"},
        {"name": 7},
        {"work": ".."},
        {"places": {"tokenizer.model": "../../x"}},
        {"manifest": {}},
    ],
    ids=str,
)
def test_a_journal_of_another_form_is_refused(source, tmp_path, change):
    run(source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    journal = {"work": ".partial", "name": "text", "manifest": manifest, "places": {}} | change
    (tmp_path / "out" / ".install.json").write_text(json.dumps(journal))
    with pytest.raises(ValueError, match=r"\.install\.json is damaged .*remove it, and prepare the data again"):
        run(source, tmp_path / "out")


def test_a_manifest_of_before_is_read(source, tmp_path):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["skipped"]["kinds"], manifest["skipped"]["notes"]
    path.write_text(json.dumps(manifest))
    assert run(source, tmp_path / "out").up_to_date
    HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")


# Validation shards named as training shards ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_shard(folder / "x_train_000000.bin", np.arange(100))
    write_shard(folder / "x_val_000000.bin", np.arange(100, 200))
    return folder


@pytest.mark.parametrize("way", ["../", "absolute", "symlink", "folder link", "hard link", "copy", "./", "twice"])
def test_a_validation_shard_named_as_training_shard_is_refused(folder, way):
    val = folder / "x_val_000000.bin"
    alias, named = folder / "y_train_000000.bin", "y_train_*"
    if way == "symlink":
        alias.symlink_to(val)
    elif way == "hard link":
        alias.hardlink_to(val)
    elif way == "copy":
        shutil.copy(val, alias)
    elif way == "folder link":
        (folder.parent / "other").symlink_to(folder)
        named = str(folder.parent / "other" / "x_val_*")
    else:
        named = {"../": "../data/x_val_*", "absolute": str(val), "./": "./x_val_000000.bin", "twice": "x_*"}[way]
    with pytest.raises(ValueError, match="training on validation text makes its score worthless"):
        HymbaDataModule(str(folder), train_files=named, seq_len=16).setup("fit")
    alias.unlink(missing_ok=True)
    HymbaDataModule(str(folder), seq_len=16).setup("fit")


def test_files_of_one_size_are_compared_to_the_end(tmp_path):
    content = bytearray(os.urandom(200_000))
    (tmp_path / "a").write_bytes(content)
    content[70_000] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert first_common([tmp_path / "a"], [tmp_path / "b"]) is None
    shutil.copy(tmp_path / "a", tmp_path / "c")
    assert first_common([tmp_path / "b", tmp_path / "a"], [tmp_path / "c"]) == (tmp_path / "a", tmp_path / "c")
