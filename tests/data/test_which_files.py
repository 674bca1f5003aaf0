"""Which files are read: links, kinds, names of any bytes, paths that look like patterns; and what helpers import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import TEXTS, json_lines, run

import hymba_lightning
from hymba_lightning.data import manifest as manifest_module
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.inputs import EXCLUDED_FOLDERS, find_inputs
from hymba_lightning.data.paths import find_paths
from hymba_lightning.data.skips import Skips, shown, skip_lines

TEXTS = TEXTS[:40]
LINES = json_lines(TEXTS)


def test_links_to_folders_are_followed_once_and_loops_do_no_harm(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("b")
    (tmp_path / "far" / "only_by_a_link.txt").write_text("c")
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
    assert len(files) == 3
    assert {file.path.resolve().name for file in files} == {"a.txt", "b.txt", "only_by_a_link.txt"}
    assert "deep/a.txt" in {file.key for file in files}
    assert list(skips.state()["kinds"]) == ["cannot be opened"]


def test_what_is_not_read_is_counted_by_kind(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
    for name in ("1.pdf", "2.PDF", "3.png", "LICENSE", ".hidden", "x.jsonl.bz2"):
        (tmp_path / "in" / name).write_text("x")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    (tmp_path / "again").symlink_to("in")
    # Each is counted once, however many inputs lead to it.
    ways = [str(tmp_path / name) for name in ("in", "in", "again")]
    summary = run(ways, tmp_path / "out", tokenizer)
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
    HymbaDataModule(str(out), seq_len=16).setup("fit")
    assert find_paths("run[1-3]", tmp_path)[-1].name == ("run[1]" if folder == "run[9]" else "run1")
    assert find_paths("none*", tmp_path) == []


@pytest.mark.parametrize("path", [None, "", "."])
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
    known = os.environ.get("PYTHONPATH", str(Path(hymba_lightning.__file__).parents[1]))
    environment = os.environ | ({} if path is None else {"PYTHONPATH": os.pathsep.join([known, path])})
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
    for number in range(5000):
        skips.add(f".{number:04d} file, which is not read", f"part.{number:04d}")
    state = skips.state()
    assert len(state["kinds"]) < 60
    assert state["kinds"]["others"]["count"] > 4900
    assert sum(entry["count"] for entry in state["kinds"].values()) == state["count"] == 10_000
    skips.merge(state)
    assert len(skips.state()["kinds"]) == len(state["kinds"])
    assert skip_lines({"count": 3, "first": ["a", "b"]})[1] == "    3 × could not be read: a; b; …"  # an older manifest


@pytest.mark.parametrize("inputs", [[], [""], ["a.jsonl", ""]])
def test_an_empty_input_is_not_the_current_folder(tmp_path, tokenizer, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="an input is empty, or there is none"):
        run(inputs, tmp_path / "out", tokenizer)


def test_an_input_inside_the_folder_that_is_written_is_named(tmp_path, tokenizer):
    (tmp_path / "out" / "in").mkdir(parents=True)
    (tmp_path / "out" / "in" / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"in' lies in out=.*, of which nothing is read; choose another folder"):
        run(tmp_path / "out" / "in", tmp_path / "out", tokenizer)


def test_an_input_of_which_nothing_can_be_read_is_refused_with_the_cause(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.bin").write_bytes(bytes(100))
    (tmp_path / "in" / "text.txt").symlink_to("text.txt")
    with pytest.raises(FileNotFoundError) as refused:
        find_inputs([str(tmp_path / "in")], (), 0, tmp_path / "out")
    assert f"1 × .bin file, which is not read: {tmp_path}/in/train.bin" in str(refused.value)
    assert f"{tmp_path}/in/text.txt: Too many levels of symbolic links" in str(refused.value)


def test_before_the_decision_is_written_nothing_of_the_new_data_is_in_place(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}

    def killed(*_):
        raise KeyboardInterrupt

    (tmp_path / "b.jsonl").write_bytes(json_lines(text[::-1] for text in TEXTS))
    monkeypatch.setattr(manifest_module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.jsonl", tmp_path / "out", tokenizer, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")} == before
