"""A key that stands twice in YAML is told with both lines, wherever the project reads one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from hymba_lightning.cli import run
from hymba_lightning.errors import UsageError
from hymba_lightning.generation.loading import find_tokenizer
from hymba_lightning.options import CommandParser, with_config_files
from hymba_lightning.report.reading import read_yaml
from hymba_lightning.studies.ttt import TTTStudy
from hymba_lightning.studies.variants import Study
from hymba_lightning.yaml_text import KeyTwiceError, MisleadingError, load_yaml


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "a stands twice, in lines 1 and 3"),
        ("a:\n  b: {c: 1,\n    d: 2,\n    c: 3}", "a.b.c stands twice, in lines 2 and 4"),
        ("- x: 1\n- y: [{z: 1}, {z: 1, z: 1}]", "[1].y[1].z stands twice, in line 2"),
        ("yes: 1\ntrue: 2", "true stands twice, in lines 1 and 2"),
        ("16: 1\n0x10: 2", "0x10 stands twice, in lines 1 and 2"),
        (
            "data:\n  mixture:\n    books: 0.3\n    web: 0.1\n    books: 0.2",
            "data.mixture.books stands twice, in lines 3 and 5",
        ),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(text, told):
    with pytest.raises(KeyTwiceError) as refused:
        load_yaml(text)
    assert refused.value.problem == f"{told}: leave one out"


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {a: 2}",
        "x: &x {k: 1}\ny: {<<: *x, k: 2}\nz: [*x, *x]",
        "b: &b {k: 0}\na: &a {<<: *b, k: 1}\nz: {<<: *a, j: 1}",
        "a.b: 1\na: {c: 2}",
        "",
    ],
)
def test_other_texts_are_read_as_the_library_does(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:\n  b: 010", "a.b is 010 in line 2, which YAML reads as 8"),
        ("a: [1, 10:00:00:00]", "a[1] is 10:00:00:00 in line 1, which YAML reads as 2160000"),
    ],
)
def test_a_number_that_looks_like_another_is_refused(text, told):
    with pytest.raises(MisleadingError) as refused:
        load_yaml(text)
    assert refused.value.problem.startswith(f"{told}: write that, or '")
    assert load_yaml("a: '010'\nb: 07\nc: 0x10\nd: 00:00:10:00") == {"a": "010", "b": 7, "c": 16, "d": "00:00:10:00"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "data: {seq_len: null}",
            "data.seq_len is null, which is none of its values: leave it out for 32768, or name one",
        ),
        ("export: {enabled: ~}", "export.enabled is null, which is none of its values"),
        (
            "run_dir: 20261130",
            "--run_dir: expected text or null, got '20261130', which is none in YAML: put it in quotes",
        ),
        ("trainer: {max_steps: 010}", "trainer.max_steps is 010 in line 1, which YAML reads as 8"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused_in_a_file(tmp_path, text, told):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        run(["fit", "--config", str(tmp_path / "a.yaml"), "--print_config"])
    assert told in str(refused.value)


def test_an_alias_that_holds_itself_ends():
    value = load_yaml("a: &a\n  b: *a")
    assert value["a"]["b"] is value["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model.net.window: 5\nmodel:\n  net: {window: 6}", "model in line 2 replaces model.net.window of line 1"),
        ("model.net.window: 5\nmodel: {compile: true}", "model in line 2 replaces model.net.window of line 1"),
        ("model:\n  net: {window: 6}\nmodel.net.window: 5", "model.net.window stands twice, in lines 2 and 3"),
        ("model: {net: {window: 6}}\nmodel.net: {d_model: 8}", "model.net stands twice, in lines 1 and 2"),
    ],
)
def test_an_option_of_a_config_that_stands_there_in_two_spellings_is_told(text, told, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"^--config {tmp_path}/a\.yaml: {told}: "):
        with_config_files(["fit", "--config", str(tmp_path / "a.yaml")])


def test_an_option_with_dots_adds_to_a_group_before_it(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {net: {window: 6}}\nmodel.net.d_model: 8\nmodel.net.n_heads: 2\n")
    assert with_config_files(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("read", [Study.from_yaml, TTTStudy.from_yaml])
def test_a_study_with_a_variant_twice_is_refused(read, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("baseline: a\nrecipes: {a: {epochs: 0}}\nvariants:\n  a: {x: 1}\n  a: {x: 2}\n")
    with pytest.raises(UsageError, match=rf"^{path}: variants\.a stands twice, in lines 4 and 5: leave one out$"):
        read(path)


def test_a_run_whose_config_says_a_thing_twice_is_not_believed(tmp_path):
    config, notes = tmp_path / "config.yaml", []
    config.write_text("data:\n  tokenizer: a.model\n  tokenizer: b.model\n")
    assert read_yaml(config, notes) == {}
    assert "data.tokenizer stands twice, in lines 2 and 3" in notes[0]
    with pytest.raises(ValueError, match=r"damaged \(data\.tokenizer stands twice, in lines 2 and 3: leave one out\)"):
        find_tokenizer(tmp_path / "artifact.hymba", None, None)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_values_on_the_command_line_and_files_that_stand_for_them_are_read_so_too(tmp_path):
    (tmp_path / "optimizer.yaml").write_text("warmup_share: 0.1\nwarmup_share: 0.2\n")
    (tmp_path / "outer.yaml").write_text("model: {optimizer: optimizer.yaml}\n")
    (tmp_path / "logger.yaml").write_text("class_path: CSVLogger\ninit_args: {save_dir: a, save_dir: b}\n")
    for option, value, told in (
        ("--data.mixture", "{a: 0.2, a: 0.3}", "--data.mixture {a: 0.2, a: 0.3}: a stands twice, in line 1"),
        (
            "--model.optimizer",
            f"{tmp_path}/optimizer.yaml",
            "optimizer.yaml: warmup_share stands twice, in lines 1 and",
        ),
        ("--trainer.logger", f"{tmp_path}/logger.yaml", "logger.yaml: init_args.save_dir stands twice, in line 2"),
        ("--config", f"{tmp_path}/outer.yaml", "'optimizer.yaml': warmup_share stands twice, in lines 1 and 2"),
    ):
        with pytest.raises(UsageError) as refused:
            run(["fit", option, value])
        assert told in str(refused.value)


def test_a_text_is_no_yaml_whatever_it_looks_like():
    parser = CommandParser(prog="hymba sample")
    parser.add_argument("texts", type=str, nargs="+")
    parser.add_argument("--count", type=int)
    given = ["{a: 1, a: 2}", "a: 1\na: 2"]
    assert parser.parse_args(given).texts == given
    with pytest.raises(UsageError, match=r"^--count: expected a whole number, got 'x'$"):
        parser.parse_args([*given, "--count", "x"])


def test_the_loader_is_no_slower_than_the_librarys_own():
    """It is libyaml's, where the library's default is written in Python."""
    text = (Path(__file__).parent.parent / "configs" / "best.yaml").read_text(encoding="utf-8")

    def seconds(load) -> float:
        took = []
        for _ in range(5):
            started = time.perf_counter()
            load(text)
            took.append(time.perf_counter() - started)
        return min(took)

    assert load_yaml(text, dotted=True) == yaml.safe_load(text)
    assert seconds(load_yaml) < seconds(yaml.safe_load)
