"""Which text is for validation: a file's tail, texts of its own, never one that is trained on; and who may write."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS, documents

from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.data import inputs as inputs_module
from hymba_lightning.data.inputs import InputFile, head_and_tail
from hymba_lightning.data.prepare import prepare


def run(sources, out, tokenizer, **arguments):
    return prepare(
        [str(source) for source in sources],
        **({"out": str(out), "tokenizer": tokenizer, "workers": 1, "progress": False} | arguments),
    )


def test_of_a_single_text_file_the_tail_is_for_validation(tmp_path, tokenizer):
    (tmp_path / "input.txt").write_bytes("\r\n\r\n".join(TEXTS).encode())
    out = tmp_path / "out"
    run([tmp_path / "input.txt"], out, tokenizer, val_fraction=0.2)
    (train,), (val,) = documents(out, "train"), documents(out, "val")
    assert train + val == "\n\n".join(TEXTS)
    assert val in ["\n\n".join(TEXTS[first:]) for first in (47, 48, 49)]
    assert run([tmp_path / "input.txt"], out, tokenizer, val_fraction=0.2).up_to_date


def test_a_single_file_with_a_separator_is_split_by_document(tmp_path, tokenizer):
    (tmp_path / "input.txt").write_bytes("\r\n\r\n".join(TEXTS).encode())
    out = tmp_path / "out"
    run([tmp_path / "input.txt"], out, tokenizer, separator=r"\n\n")
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "é", "日", "😀", "\n", "\n\n", " ", "\r\n"]), min_size=2, max_size=200).map("".join),
    st.floats(0.001, 0.999),
    st.integers(1, 40),
)
def test_head_and_tail_are_whole_texts_and_together_the_file(tmp_path_factory, text, val_fraction, window):
    path = tmp_path_factory.mktemp("tail") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "CUT_WINDOW_BYTES", window)
        parts = head_and_tail(InputFile(path, "a.txt"), val_fraction)
    raw = path.read_bytes()
    cut = [raw[part.start : part.stop] for part in parts]
    assert b"".join(cut) == raw
    assert all(part.decode() for part in cut)
    assert [part.split for part in parts] in (["train", "val"], [None])


def test_a_document_longer_than_the_limit_is_cut_and_told(tmp_path, tokenizer):
    (tmp_path / "input.txt").write_text("\n\n".join(TEXTS))
    summary = run([tmp_path / "input.txt"], tmp_path / "out", tokenizer, max_document_bytes=1000)
    texts = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert "".join(texts) == "\n\n".join(TEXTS)
    assert max(len(text) for text in texts) <= 1000
    assert "longer than max_document_bytes, cut into several" in str(summary)


def test_validation_texts_of_their_own(tmp_path, tokenizer):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[45:]))
    summary = run([tmp_path / "train"], tmp_path / "out", tokenizer, val_inputs=[str(tmp_path / "val.jsonl")])
    assert sorted(documents(tmp_path / "out", "train")) == sorted(TEXTS[:45])
    assert sorted(documents(tmp_path / "out", "val")) == sorted(TEXTS[45:])
    assert "5 × training document that is for validation too, left out" in str(summary)
    assert run([tmp_path / "train"], tmp_path / "out", tokenizer, val_inputs=[str(tmp_path / "val.jsonl")]).up_to_date
    with pytest.raises(FileExistsError, match="made with another files, val_inputs"):
        run([tmp_path / "train"], tmp_path / "out", tokenizer)


def test_a_validation_text_in_another_kind_of_file_is_left_out_of_training_too(tmp_path, tokenizer):
    """A text file ends with a line end, and its line ends are the same on all systems; a JSON line's text is not."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": "a\r\n" + text}) + "\n" for text in TEXTS))
    (tmp_path / "val").mkdir()
    for number, text in enumerate(TEXTS[:4]):
        (tmp_path / "val" / f"{number}.txt").write_bytes(f"a\r\n{text}\n".encode())
    run([tmp_path / "train.jsonl"], tmp_path / "out", tokenizer, val_inputs=[str(tmp_path / "val")])
    assert len(documents(tmp_path / "out", "val")) == 4
    assert len(documents(tmp_path / "out", "train")) == len(TEXTS) - 4


@pytest.mark.parametrize("way", ["same", "../", "symlink", "hard link", "copy", "folder"])
def test_a_file_for_both_is_refused(tmp_path, tokenizer, way):
    train = tmp_path / "train" / "a.jsonl"
    train.parent.mkdir()
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    val = tmp_path / "b.jsonl"
    if way == "symlink":
        val.symlink_to(train)
    elif way == "hard link":
        val.hardlink_to(train)
    elif way == "copy":
        val.write_bytes(train.read_bytes())
    else:
        val = {"same": train, "../": train.parent / ".." / "train" / "a.jsonl", "folder": train.parent}[way]
    with pytest.raises(ValueError, match="training on validation text makes its score worthless"):
        run([train.parent], tmp_path / "out", tokenizer, val_inputs=[str(val)])


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (TEXTS, [], "the validation inputs hold no document that can be read"),
        ([], TEXTS, "the inputs hold no document that can be read"),
        (
            TEXTS[:3],
            [*TEXTS[:3], "more"],
            "the inputs hold no document that can be read, but those that are for validation too",
        ),
    ],
)
def test_a_split_without_documents_is_named(tmp_path, tokenizer, train, val, message):
    for name, texts in (("train", train), ("val", val)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n{")
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "train.jsonl"], tmp_path / "out", tokenizer, val_inputs=[str(tmp_path / "val.jsonl")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction is 1.0; .*give val_inputs"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": "my_val"}, "not look like a split's"),
        ({"name": ""}, "name is ''"),
        ({"name": "a\x1b[2J"}, r"name is 'a\\x1b"),
        ({"name": "a\nb"}, r"name is 'a\\nb"),
        ({"separator": ""}, "separator is empty"),
        ({"seed": 1 << 64}, "seed is over 64 bits"),
        ({"character_coverage": float("nan")}, "character_coverage is nan"),
        ({"character_coverage": 7.0}, "character_coverage is 7.0"),
        ({"val_inputs": [""]}, "an input is empty"),
        ({"val_inputs": []}, "an input is empty, or there is none"),
        ({"shard_tokens": 1 << 31}, "a shard's header counts to"),
        ({"max_document_bytes": 0}, "max_document_bytes is 0"),
    ],
)
def test_impossible_arguments_tell_the_cause(tmp_path, tokenizer, arguments, message):
    (tmp_path / "a.txt").write_text("a b c")
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "a.txt"], tmp_path / "out", tokenizer, **arguments)
    assert not (tmp_path / "out").exists()


# Who may write --------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a b c\n\nd e f")
    with FolderClaim(tmp_path / "out", "something else"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "hymba_lightning",
                "prepare",
                str(tmp_path / "a.txt"),
                "--out",
                str(tmp_path / "out"),
                "--tokenizer",
                tokenizer,
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "is in use by something else (process" in done.stderr
        assert "Traceback" not in done.stderr
    run([tmp_path / "a.txt"], tmp_path / "out", tokenizer)
    with FolderClaim(tmp_path / "out", "something else"), pytest.raises(FolderInUseError):
        run([tmp_path / "a.txt"], tmp_path / "out", tokenizer)  # up to date, but for how long?
    (tmp_path / "out" / ".parts").mkdir()
    with pytest.raises(FileExistsError, match="parts of a preparation on a cluster"):
        run([tmp_path / "a.txt"], tmp_path / "out", tokenizer)
