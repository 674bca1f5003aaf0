"""Preparing again, otherwise, or after an interruption: whole or not there, replaced on demand; what is refused."""

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import file_digests, prepare_words

from hymba_lightning.data import shard_writing
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, find_inputs
from hymba_lightning.errors import sentence

CHALLENGE_TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"


def test_same_again_does_nothing_and_says_so(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    prepare_words(tmp_path, tokenizer=tokenizer)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = prepare_words(tmp_path, tokenizer=tokenizer, workers=2, overwrite=True)
    assert again.up_to_date
    assert "is up to date" in str(again)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_data_are_replaced_only_on_demand(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    out = tmp_path / "out"
    prepare_words(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
    before = file_digests(out)
    with pytest.raises(FileExistsError, match="made with another shard_tokens; choose another folder, or pass overwr"):
        prepare_words(tmp_path, tokenizer=tokenizer)
    next((tmp_path / "in").glob("*.txt")).write_text("changed")
    with pytest.raises(FileExistsError, match="made with another files"):
        prepare_words(tmp_path, tokenizer=tokenizer, shard_tokens=3000)
    assert file_digests(out) == before
    prepare_words(tmp_path, tokenizer=tokenizer, overwrite=True)
    assert set(file_digests(out)) == {
        "manifest.json",
        "tokenizer.model",
        "text_train_000000.bin",
        "text_val_000000.bin",
    }
    assert not (out / ".partial").exists()
    (out / "text_val_000000.bin").unlink()
    with pytest.raises(FileExistsError, match=r"text_val_000000\.bin is missing; .* pass overwrite"):
        prepare_words(tmp_path, tokenizer=tokenizer)
    prepare_words(tmp_path, tokenizer=tokenizer, name="renamed", overwrite=True)
    assert not list(out.glob("text_*"))
    (out / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="holds data without a manifest"):
        prepare_words(tmp_path, tokenizer=tokenizer, name="renamed")
    with pytest.raises(FileExistsError, match=r"shards of other data \(renamed_train_000000\.bin\)"):
        prepare_words(tmp_path, tokenizer=tokenizer, overwrite=True)


def test_interrupted_run_leaves_the_old_data_whole(tmp_path: Path, texts, tokenizer: str, monkeypatch) -> None:
    prepare_words(tmp_path, tokenizer=tokenizer)
    before = file_digests(tmp_path / "out")

    def full_disk(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writing._ShardFile, "commit", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare_words(tmp_path, tokenizer=tokenizer, seed=5, overwrite=True)
    assert file_digests(tmp_path / "out") == before
    with pytest.raises(OSError, match="No space left"):
        prepare_words(tmp_path, tokenizer=tokenizer, out=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def no_file_longer_than(n_bytes: int) -> Iterator[None]:
    """The system refuses to write more than that into a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("limit", "file"), [(1000, "tokenizer.model"), (8000, "_train_000000.bin")])
def test_a_full_disk_is_named_with_the_file_and_the_remedy(tmp_path, texts, tokenizer: str, limit, file) -> None:
    prepare_words(tmp_path, tokenizer=tokenizer)
    before = file_digests(tmp_path / "out")
    with no_file_longer_than(limit), pytest.raises(OSError, match="File too large") as refused:
        prepare_words(tmp_path, tokenizer=tokenizer, seed=5, overwrite=True)
    assert re.search(rf"{re.escape(file)}: File too large; raise the limit .*another disk$", sentence(refused.value))
    assert file_digests(tmp_path / "out") == before


def test_an_installation_that_began_is_finished_by_the_next_call(tmp_path, texts, tokenizer: str, monkeypatch) -> None:
    prepare_words(tmp_path, tokenizer=tokenizer)
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
            prepare_words(tmp_path, tokenizer=tokenizer, seed=5, overwrite=True)
    with pytest.raises(ValueError, match="are being replaced, or were when `hymba prepare` ended"):
        HymbaDataModule(str(tmp_path / "out"), seq_len=16).setup("fit")
    # The next call finishes what was decided, whatever it wants itself.
    with pytest.raises(FileExistsError, match="made with another files, seed"):
        prepare_words(tmp_path, tokenizer=tokenizer)
    assert prepare_words(tmp_path, tokenizer=tokenizer, seed=5).up_to_date
    prepare_words(tmp_path, tokenizer=tokenizer, seed=5, out=str(tmp_path / "whole"))
    assert file_digests(tmp_path / "out") == file_digests(tmp_path / "whole")
    assert not (tmp_path / "out" / ".partial").exists()


def test_smallest_fraction_that_would_do_is_named(tmp_path: Path, texts: dict[str, str], tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"none of the 40 documents fell to validation") as caught:
        prepare_words(tmp_path, tokenizer=tokenizer, val_fraction=1e-6)
    fraction = float(str(caught.value).split("raise it to ")[1].split()[0])
    summary = prepare_words(tmp_path, tokenizer=tokenizer, val_fraction=fraction)
    assert summary.manifest["splits"]["val"]["documents"] == 1
    with pytest.raises(ValueError, match="all 40 documents fell to validation"):
        prepare_words(tmp_path, tokenizer=tokenizer, val_fraction=1 - 1e-9, out=str(tmp_path / "b"))


def test_single_document_is_refused_with_a_remedy(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a b c"}\n{"tex')
    with pytest.raises(ValueError, match=r"hold 1 document .*\(1 could not: .*one\.jsonl:2.*\).*separator.*val_inputs"):
        prepare_words(tmp_path, [str(tmp_path / "one.jsonl")], tokenizer=tokenizer)


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
        prepare_words(tmp_path, **arguments)


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
