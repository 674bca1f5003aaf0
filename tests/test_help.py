"""Near misses by name; help and versions that answer at once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hymba_lightning import errors, help_text, usage
from hymba_lightning.commands import run_command
from hymba_lightning.errors import UsageError
from hymba_lightning.options import with_config_files
from hymba_lightning.signals import Saved
from hymba_lightning.studies import STUDIES
from hymba_lightning.terminal import set_up_messages

HYMBA = [sys.executable, "-m", "hymba_lightning"]


@pytest.mark.parametrize(
    ("command", "near"),
    [("train", "fit"), ("tset", "test"), ("import_reference", "import-reference"), ("generate", "sample")],
)
def test_an_unknown_command_is_answered_without_any_library(command, near):
    code = (
        "import sys\nfrom hymba_lightning.__main__ import main\n"
        f"sys.argv = ['hymba', {command!r}, '--config', 'x']\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'lightning', 'jsonargparse', 'yaml'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 []\n"
    assert f"did you mean {near}?" in done.stderr
    assert all(name in done.stderr for name in usage.COMMANDS)
    assert done.stderr.count("\n") == 1


def test_an_option_before_the_command_is_named():
    done = subprocess.run([*HYMBA, "--config", "x", "fit"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--config comes before a command" in done.stderr


def test_what_may_be_left_out_of_a_sample_is_not_called_required(capsys):
    with pytest.raises(SystemExit):
        run_command("sample", ["--help"])
    assert "required" not in capsys.readouterr().out


def test_versions_are_told_without_importing_what_they_are_of():
    done = subprocess.run([*HYMBA, "--version"], capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first == f"hymba {usage.__version__}"
    assert f"torch {torch.__version__}" in second
    assert "lightning " in second


@pytest.mark.parametrize("args", [["version"], ["-V"], ["fit", "--version"], ["sample", "-V"]])
def test_versions_are_told_in_whatever_words(args):
    assert usage.as_meant(args) == ["--version"]


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        ([], ["--help"]),
        (["help"], ["--help"]),
        (["-h", "--help"], ["--help"]),
        (["help", "fit"], ["fit", "--help"]),
        (["--help", "study", "step"], ["study", "step", "--help"]),
        (["fit", "help"], ["fit", "--help"]),
        # A folder may have this name.
        (["report", "help"], ["report", "help"]),
        (["sample", "x", "--prompt", "version"], ["sample", "x", "--prompt", "version"]),
    ],
)
def test_help_is_asked_for_in_whatever_words(args, meant):
    assert usage.as_meant(args) == meant


@pytest.mark.parametrize(
    ("args", "expected"), [(["version"], "hymba 0"), (["help", "inspect"], "usage: hymba inspect")]
)
def test_the_command_line_takes_them(args, expected):
    done = subprocess.run([*HYMBA, *args], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(expected)


@pytest.mark.parametrize(("option", "near"), [("--versio", "--version"), ("--hlep", "--help"), ("--debg", "--debug")])
def test_an_unknown_option_before_the_command_has_a_near_miss(option, near):
    with pytest.raises(usage.UsageError, match=rf"unknown option {option} \(did you mean {near}\?\)"):
        usage.check_command(option, [])


def test_a_folder_that_is_named_as_a_shipped_config_is_told_from_it(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(usage.UsageError, match=r"demo is a folder, .* \(did you mean --config demo\.yaml\?\)"):
        with_config_files(["--config", "demo"])
    assert with_config_files(["--config", "demo.yaml"])[1].endswith("configs/demo.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("--temp", "--temperature"),
        ("--lr", "--model.optimizer.matrix_lr"),
        ("--gpus", "--trainer.devices"),
        ("--max", "--trainer.max_steps"),
        ("--model.net.widnow", "--model.net.window"),
        ("--model.budgetseconds", "--model.budget_seconds"),
        ("--seq_len", "--data.seq_len"),
        ("--data.seq-len", "--data.seq_len"),
        ("--trainer.maxsteps", "--trainer.max_steps"),
        ("--zzz", None),
    ],
)
def test_near_misses(name, expected):
    known = [
        "--model.net.window",
        "--model.net.d_conv",
        "--model.net.dt_min",
        "--model.budget_seconds",
        "--data.seq_len",
        "--temperature",
        "--model.optimizer.matrix_lr",
        "--trainer.devices",
        "--trainer.max_steps",
        "--trainer.min_steps",
        "--run_dir",
    ]
    assert usage.near_misses(name, known)[:1] == ([expected] if expected else [])


def test_every_option_whose_words_hold_the_given_one_is_named_and_those_of_the_named_group_first():
    lrs = ["matrix_lr", "embed_lr", "lr_floor", "decay_with_lr"]
    known = [*(f"--model.optimizer.{lr}" for lr in lrs), "--model.ttt.lr", "--model.ttt.rest_lr", "--run_dir"]
    likely_first = [known[0], "--model.ttt.lr", known[1], known[3], "--model.ttt.rest_lr", known[2]]
    assert usage.near_misses("--lr", known) == likely_first
    assert usage.near_misses("--model.ttt.learning_rate", known) == ["--model.ttt.lr", "--model.ttt.rest_lr"]
    assert usage.near_misses("--optimizer.lr", known) == [known[index] for index in (0, 1, 3, 2)]
    asked = usage.did_you_mean("--lr", known)
    assert asked == f" (did you mean {', '.join(likely_first[:-1])} or {likely_first[-1]}?)"
    many = usage.did_you_mean("--lr", [f"--group_{index}.lr" for index in range(40)])
    assert many.endswith(".lr or 28 more?)")
    assert many.count("--") == 12


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["export", "runs/a"], r"runs/a stands alone: did you mean --ckpt runs/a\?"),
        (["inspect", "{}/run"], r"run is a folder, and an artifact is needed \(did you mean .*/run/artifact\.hymba\?"),
        (["inspect", "{}/none"], r"none does not exist"),
        (
            ["audit", "{}/run", "--data_dir", "{}/none"],
            r"--data_dir .*none is no folder: give one that `hymba prepare`",
        ),
        (["export", "--ckpt", "x", "--out", "y", ""], r"an argument is empty: a shell makes that of a variable"),
        (["prepare", "{}", "--out", ""], r"out is empty: a shell makes that of a variable that is not set; name"),
        (["report", "{}/run", ""], r"run is empty: a shell"),
        (
            ["prepare", "{}", "--exclude", "abc.py"],
            r"--exclude: expected a list, got 'abc\.py'; did you mean \[abc\.py\]\?",
        ),
        (
            ["prepare", "{}/empty.txt", "--out", "{}/o"],
            r"to train a tokenizer on \(file without a document: .*empty\.txt\)",
        ),
        (["sample", "{}/run", "--seed", str(1 << 63)], r"seed is \d+, and larger than numbers can be here"),
        (["sample", "{}/run", "--data.tokenizer", ""], r"data\.tokenizer is empty: a shell"),
    ],
)
def test_a_thing_in_anothers_place_is_told_with_what_may_be_meant(args, told, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "artifact.hymba").touch()
    (tmp_path / "empty.txt").touch()
    command, *rest = (arg.replace("{}", str(tmp_path)) for arg in args)
    with pytest.raises((OSError, ValueError), match=told):
        run_command(command, rest)


def test_what_a_launcher_left_in_the_environment_silences_and_stops_nothing(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert errors.report(UsageError("no such thing"), "hymba fit") == 2
    assert capsys.readouterr().err == "hymba fit: no such thing\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert errors.report(UsageError("no such thing"), "hymba fit") == 2
    assert capsys.readouterr().err == "", "rank 0 says it"
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK is 'first' in the environment, and has to be a whole number"):
        usage.check_environment("prepare")
    monkeypatch.setenv("RANK", "-1")
    usage.check_environment("inspect")
    with pytest.raises(UsageError, match="RANK is '-1'"):
        usage.check_environment("fit")


def test_what_a_library_warns_of_ends_no_command(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_up_messages()
        warnings.warn("it will change", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: it will change\n"


def test_the_config_of_an_old_run_loses_only_what_did_nothing():
    idle = {"model": {"qat_start": 1.0, "compile": False, "runtime": {"qat_bits": 0, "loss_backend": "auto"}}}
    idle["model"]["ttt"] = {"compile": False, "epochs": 1}
    assert usage.without_removed(idle) == {
        "model": {"compile": False, "runtime": {"loss_backend": "auto"}, "ttt": {"epochs": 1}}
    }
    used = {"model": {"qat_start": 0.85, "runtime": {"qat_bits": 4}}}
    assert usage.without_removed(used) == {"model": {"qat_start": 0.85, "runtime": {"qat_bits": 4}}}
    assert usage.without_removed({"model": None}) == {"model": None}
    assert usage.without_removed("text") == "text"


def test_an_interrupted_study_says_how_it_goes_on():
    args = ["study", "seeds", "--out", "a b", "--", "--config", "demo"]
    assert usage.after_stop(args, "SIGINT", None).endswith(
        "To go on with them: hymba study seeds --out 'a b' -- --config demo"
    )


def test_an_interrupted_measurement_keeps_nothing_and_says_so():
    line = ["study", "step", "--steps", "30"]
    assert usage.after_stop(line, "SIGTERM", None) == (
        "stopped by SIGTERM before it was done; to do it again: hymba study step --steps 30"
    )
    assert set(usage.STUDIES_THAT_GO_ON) < set(STUDIES)


def test_the_command_that_goes_on_keeps_what_was_asked_for():
    saved = Saved(Path("runs/a b/checkpoints/last.ckpt"), 7)
    args = ["fit", "--config", "c.yaml", "--ckpt_path", "old.ckpt", "--overwrite=true", "--model.compile", "true"]
    assert usage.resume_command(args, saved) == (
        "hymba fit --config c.yaml --model.compile true --run_dir 'runs/a b' --ckpt_path last"
    )
    elsewhere = Saved(Path("/ckpt/last.ckpt"), 7)
    assert usage.resume_command(["fit", "--run_dir", "a"], elsewhere) == (
        "hymba fit --run_dir a --ckpt_path /ckpt/last.ckpt"
    )


@pytest.fixture(scope="module")
def help_of(tmp_path_factory):
    """Runs `hymba <command> --help` with a cache of its own: what each command printed, whether torch was imported."""
    cache = tmp_path_factory.mktemp("cache")

    def ask(*commands: str, folder: Path = cache) -> tuple[list[str], bool]:
        code = (
            "import sys\nfrom hymba_lightning.__main__ import main\n"
            f"for command in {commands!r}:\n"
            "    sys.argv = ['hymba', command, '--help']\n    main()\n    print('\\f', end='')\n"
            "print('torch' in sys.modules, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        )
        return done.stdout.split("\f")[:-1], done.stderr.splitlines()[-1] == "True"

    return ask


@pytest.mark.more
def test_help_is_made_once_and_then_answers_without_torch(help_of):
    live, imported = help_of(*help_text.COMMANDS)
    assert imported
    assert all(f"usage: hymba {command} " in text for command, text in zip(help_text.COMMANDS, live, strict=True))
    assert help_of(*help_text.COMMANDS) == (live, False)


@pytest.mark.more
def test_help_is_live_where_nothing_can_be_kept(help_of, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    text, imported = help_of("validate", folder=tmp_path / "file")
    assert imported
    assert text == help_of("validate")[0]


def test_kept_help_belongs_to_these_very_sources(monkeypatch, tmp_path):
    before = help_text.kept_path("fit")
    (tmp_path / "other.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(help_text, "ROOT", tmp_path)
    assert help_text.kept_path("fit") != before


def test_help_begins_with_what_is_most_used_and_ends_with_lightnings_options(help_of):
    (text,), _ = help_of("fit")
    places = [
        text.index(part)
        for part in (
            "most used:",
            "  --config ",
            "  --model.budget_seconds",
            "--model.net.window WINDOW",
            "--export.quantization.bits",
            "Lightning's Trainer (",
            "--trainer.accumulate_grad_batches ACC",
        )
    ]
    assert places == sorted(places)
    assert text.count("\n", 0, text.index("--model.net.window WINDOW")) < 120
    assert "usage: hymba fit --config FILE [options]\n" in text
    assert text.index("Train inside a budget") < places[0], "what the command does comes before its options"
    # Lightning's options take a few lines each, and nobody's classes are listed.
    assert text.count("\n", text.index("Lightning's Trainer")) < 140
    assert "known" not in text.partition("Lightning's Trainer")[2]
    assert "Keys a token sees" in text


def test_every_option_called_common_is_one(help_of):
    from hymba_lightning.training_options import COMMON, NOT_IN_HELP

    (fit, test), _ = help_of("fit", "test")
    for name in COMMON:
        assert f"  --{name} " in fit.partition("most used:")[2].partition("\n\n")[2] + test or f"--{name}" in fit
    for name in NOT_IN_HELP:
        assert f"--{name} " not in fit
