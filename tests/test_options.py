"""The configs that come with the package are found by name."""

import contextlib
from pathlib import Path

import docstring_parser
import pytest

from hymba_lightning import cli, options
from hymba_lightning.commands import run_command
from hymba_lightning.errors import UsageError
from hymba_lightning.options import shipped_configs, with_config_files

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", "./demo.yaml"])
def test_a_config_that_is_no_file_is_one_of_the_shipped(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_config_files(["fit", "--config", name, "--run_dir", "demo"]) == [
        "fit",
        "--config",
        str(CONFIGS / "demo.yaml"),
        "--run_dir",
        "demo",
    ]
    assert with_config_files([f"--config={name}"]) == [f"--config={CONFIGS / 'demo.yaml'}"]


def test_a_file_goes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("model: {budget_seconds: 1}\n")
    assert with_config_files(["--config", "demo.yaml"]) == ["--config", "demo.yaml"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nothing.yaml", ""),
        ("elsewhere/demo.yaml", "demo"),
        ("/nowhere/configs/demo.yaml", "demo"),
        ("demo.yml", "demo"),
        ("hymba-32K", "hymba_32k"),
        ("my_confg.yaml", "my_config.yaml"),
    ],
)
def test_an_unknown_config_is_refused_with_what_may_be_meant_and_the_shipped_ones(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_config.yaml").write_text("model: {budget_seconds: 1}\n")
    with pytest.raises(UsageError) as refused:
        with_config_files(["--config", name])
    told, _, shipped = str(refused.value).partition(f"; shipped with the package, in {CONFIGS}: ")
    assert told.startswith(f"--config {name} does not exist")
    assert told.endswith("does not exist") if not near else f"(did you mean --config {near}" in told
    named = {*shipped.split(", "), *told.partition("--config ")[2].partition("--config ")[2].rstrip("?)").split(" or ")}
    assert named >= {path.stem for path in CONFIGS.glob("*.yaml")}, "each once, here or there"


def test_installed_configs_lie_in_the_package(tmp_path, monkeypatch):
    package = tmp_path / "hymba_lightning"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "small.yaml").write_text("{}\n")
    (package / "configs" / "studies").mkdir()
    (package / "configs" / "studies" / "few.yaml").write_text("{}\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stray.yaml").write_text("{}\n")
    monkeypatch.setattr(options, "__file__", str(package / "options.py"))
    assert shipped_configs() == {"small": package / "configs" / "small.yaml"}
    assert shipped_configs("studies") == {"few": package / "configs" / "studies" / "few.yaml"}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    ("args", "reads"),
    [
        (["fit", "--config", "demo.yaml", "--no_such_option"], False),
        (["fit", "--no_such_option", "--print_config=comments"], True),
        (["bpb", "--no_such_option"], False),
        (["bpb", "--help"], True),
    ],
)
def test_the_docstrings_of_fields_are_read_for_help_alone(args, reads, monkeypatch):
    read = []
    monkeypatch.setattr(docstring_parser, "parse_from_object", lambda found, **_: read.append(found))
    with contextlib.suppress(UsageError, SystemExit):
        (cli.run if args[0] == "fit" else lambda args: run_command(args[0], args[1:]))(args)
    assert bool(read) is reads
