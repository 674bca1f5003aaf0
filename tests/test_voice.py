"""Errors in one sentence with the right exit code, and whose fault an exception is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import injected
import pytest
import torch
import yaml
from fit_process import finish, log_of, start, write_config

from hymba_lightning import errors
from hymba_lightning.model import HymbaConfig
from hymba_lightning.ops.registry import BackendUnavailableError

HYMBA = [sys.executable, "-m", "hymba_lightning"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny data, its config, and configs that are wrong."""
    folder = tmp_path_factory.mktemp("voice")
    write_config(folder)
    for name, text in {
        "key": "model:\n  net:\n    widnow: 3\n",
        "section": "modle:\n  budget_seconds: 3\n",
        "empty_key": "model: {nett: {}}\n",
        "empty_section": "modle: {}\n",
        "idle": "model:\n  qat_start: 1.0\n  runtime:\n    qat_bits: 0\n",
        "removed": "model:\n  runtime:\n    qat_bits: 4\n",
        "type": "model:\n  net:\n    window: abc\n",
        "list": "[1, 2]\n",
        "yaml": "model: {net: [\n",
        "trainer": "trainer: 3\n",
        "net": "model: {net: [1, 2]}\n",
        "no_net": "model: {net: null}\n",
        "callbacks": "trainer: {callbacks: 3}\n",
        "monitor": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/nope}}]}\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "latin.yaml").write_bytes("# é\n".encode("latin-1"))
    (folder / "folder").mkdir()
    (folder / "a_run").mkdir()
    (folder / "a_run" / "config.yaml").write_text("{}", encoding="utf-8")
    (folder / "a_run" / "checkpoints").mkdir()
    (folder / "a_run" / "checkpoints" / "last.ckpt").touch()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
    (folder / "no.ckpt").write_bytes(b"this is no checkpoint" * 100)
    return folder


def said(work: Path, *args: str, hook: object = None) -> tuple[int | None, str]:
    """Exit code and all that a command printed; {} stands for the folder."""
    log = work / "log"
    log.unlink(missing_ok=True)
    (code,) = finish([start([arg.replace("{}", str(work)) for arg in args], log, hook=hook)])
    return code, log_of(log)


FIT = ("fit", "--config", "{}/tiny.yaml", "--run_dir", "{}/run")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((*FIT, "--model.net.widnow", "3"), ["option --model.net.widnow", "--model.net.window?", "hymba fit --help"]),
        ((*FIT, "--budget_seconds=3"), ["option --budget_seconds", "--model.budget_seconds?"]),
        ((*FIT, "--config", "{}/key.yaml"), ["key model.net.widnow", "model.net.window?"]),
        ((*FIT, "--config", "{}/section.yaml"), ["key modle", "did you mean model"]),
        ((*FIT, "--config", "{}/empty_key.yaml"), ["key model.nett", "did you mean model.net"]),
        ((*FIT, "--config", "{}/empty_section.yaml"), ["key modle", "did you mean model"]),
        # The first file is that of an old run, whose options did nothing; the second one meant it.
        (
            (*FIT, "--config", "{}/idle.yaml", "--config", "{}/removed.yaml"),
            ["key model.runtime.qat_bits was removed: late quantization-aware training", "leave it out"],
        ),
        ((*FIT, "--config", "{}/type.yaml"), ["--model.net.window: expected a whole number, got 'abc'"]),
        ((*FIT, "--config", "{}/list.yaml"), ["list.yaml holds a list"]),
        ((*FIT, "--config", "{}/yaml.yaml"), ["yaml.yaml, line 2", "no YAML"]),
        ((*FIT, "--config", "{}/latin.yaml"), ["latin.yaml is no UTF-8 text"]),
        ((*FIT, "--config", "{}/folder"), ["folder is a folder, and a YAML file is needed; the shipped ones are "]),
        ((*FIT, "--config", "{}/a_run"), ["a_run is a folder", "did you mean --config ", "a_run/config.yaml?"]),
        ((*FIT, "--config", "{}/pipe"), ["pipe is a pipe, and a YAML file is needed"]),
        ((*FIT, "--config", "{}/socket"), ["socket is a socket, and a YAML file is needed"]),
        ((*FIT, "--config", "{}/missing.yaml"), ["missing.yaml does not exist"]),
        ((*FIT, "--model.ema_decay", "abc"), ["--model.ema_decay: expected", "a number", "null", "got 'abc'"]),
        ((*FIT, "--model.optimizer.warmdown_shape", "round"), ["warmdown_shape", "'cosine', 'linear'", "'round'"]),
        ((*FIT, "--model.net.window", "0"), ["window must be at least 1"]),
        ((*FIT, "--data.data_dir", "{}/nowhere"), ["no shard matches", "nowhere"]),
        ((*FIT, "--ckpt_path", "{}/nowhere.ckpt"), ["nowhere.ckpt does not exist"]),
        ((*FIT, "--ckpt_path", "{}/no.ckpt"), ["checkpoint"]),
        ((*FIT, "--trainer.accelerator", "abacus"), ["abacus", "Available names"]),
        ((*FIT, "--trainer.devices", "0"), ["devices", "0"]),
        ((*FIT, "--trainer.strategy", "luck"), ["luck"]),
        ((*FIT, "stray"), ["argument stray"]),
        ((*FIT, "--config", "{}/trainer.yaml"), ["trainer is 3", "mapping of options, such as trainer."]),
        ((*FIT, "--config", "{}/net.yaml"), ["model.net is [1, 2]", "mapping of options, such as model.net."]),
        ((*FIT, "--config", "{}/no_net.yaml"), ["model.net is", "null", "mapping of options"]),
        (
            (*FIT, "--config", "{}/callbacks.yaml"),
            ["--trainer.callbacks: expected a list, a Callback or null, got '3'"],
        ),
        ((*FIT, "--config", "{}/monitor.yaml"), ["EarlyStopping monitors 'val/nope'", "use val/bpb or val/loss"]),
        ((*FIT, "--config"), ["--config needs a file"]),
        (("fit", "--config", "/dev/null"), ["--config /dev/null is empty", "names with values"]),
        ((*FIT, "--run_dir", "~nobody_of_this_name/a"), ["a user who is not known here", "./~nobody_of_this_name/a"]),
        ((*FIT, "--model.budget_seconds", ".inf"), ["budget_seconds is inf; it must be positive", "or null"]),
        ((*FIT, "--model.net", "3"), ["--model.net: '3' is no YAML file, and no mapping of options"]),
        ((*FIT, "--model.net", '{"window": "x"}'), ["--model.net.window: expected a whole number, got 'x'"]),
        ((*FIT, "--model.net.window", "null"), ["--model.net.window: expected a whole number, got null"]),
        (
            (*FIT, "--data.mixture", "{more: x}"),
            ["--data.mixture: expected a mapping of each name to a number or null"],
        ),
        ((*FIT, "--trainer.max_steps"), ["--trainer.max_steps needs a value"]),
        ((*FIT, "--trainer.max_step", "3"), ["option --trainer.max_step ", "--trainer.max_steps?"]),
        ((*FIT, "--run_di", "x"), ["option --run_di ", "--run_dir?"]),
        ((*FIT, "--trainer.precision", "bf17"), ["--trainer.precision: expected 64, 32, 16, ", "or null, got 'bf17'"]),
        ((*FIT, "--trainer.logger", "CsvLogger"), ["there is no Logger 'CsvLogger' (did you mean CSVLogger?)"]),
        ((*FIT, "--trainer.logger", "os.path"), ["--trainer.logger: there is no Logger 'os.path'"]),
        (
            (*FIT, "--trainer.logger", "CometLogger"),
            ["CometLogger needs the package comet-ml", "not installed: pip install 'comet-ml"],
        ),
        ((*FIT, "--trainer.logger.save_dir", "x"), ["--trainer.logger.save_dir: say first which Logger"]),
        (
            (*FIT, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dirr", "x"),
            ["--trainer.logger: unknown key save_dirr (did you mean save_dir?)"],
        ),
        ((*FIT, "--trainer.callbacks+", "EarlyStopping"), ["--trainer.callbacks needs --trainer.callbacks.monitor"]),
        (
            (*FIT, "--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.patience", "x"),
            ["--trainer.callbacks.patience: expected a whole number, got 'x'"],
        ),
        (
            (*FIT, "--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.save_top_k", "-3"),
            ["--trainer.callbacks: Invalid value for save_top_k=-3"],
        ),
        ((*FIT, "--trainer.accumulate_grad_batches", "0"), ["trainer.accumulate_grad_batches is 0"]),
        ((*FIT, "--trainer.max_steps", "-1"), ["nothing ends this run", "trainer.max_time"]),
        ((*FIT, "--trainer.max_epochs", "0"), ["nothing would be trained: trainer.max_epochs is 0"]),
        (
            (*FIT, "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:00"),
            ["nothing would be trained: trainer.max_time is 0 seconds"],
        ),
        ((*FIT, "--trainer.barebones", "true"), ["trainer.barebones"]),
        ((*FIT, "--seed_everything", "-1"), ["--seed_everything is -1", "2^32"]),
        (("fit", "--config", "{}/tiny.yaml", "--run_dir", "{}/tiny.yaml"), ["tiny.yaml cannot be made", "is a file"]),
        (("fit",), ["--config", "--data.data_dir"]),
        (("test", "--config", "{}/tiny.yaml"), ["give --ckpt_path"]),
        (("validate",), ["give --ckpt_path"]),
        (("test", "--config", "{}/tiny.yaml", "--ckpt_path", "{}/nowhere"), ["nowhere does not exist"]),
        (("sample", "--ckpt_path", "{}/nowhere"), ["nowhere does not exist"]),
        (("sample", "--ckpt_path", "x", "--temprature", "1"), ["option --temprature", "--temperature?"]),
        (("sample", "x", "--temp", "1"), ["option --temp ", "--temperature?"]),
        (("bpb", "x"), ["inputs is required: Files, folders, glob patterns"]),
        ((*FIT, "--ckpt_path", "{}/a_run"), ["a_run is a folder, and a checkpoint is needed"]),
        (
            ("test", "--config", "{}/tiny.yaml", "--ckpt_path", "{}/a_run"),
            ["a_run is a folder", "did you mean", ".ckpt?"],
        ),
        (("sample", "{}/a_run"), ["a_run is a folder", "did you mean", "checkpoints/last.ckpt?"]),
        (("inspect", "{}/tiny.yaml"), ["tiny.yaml", "not an artifact"]),
        (("inspect",), ["required", "file"]),
        (("report", "{}/nowhere"), ["nowhere"]),
        (("prepare", "{}/nowhere", "--out", "{}/out"), ["nowhere", "no file"]),
        (("export", "{}/nowhere", "{}/out"), ["nowhere"]),
        (("package", "{}/nowhere", "--out", "{}/out"), ["nowhere"]),
    ],
)
def test_bad_input_is_answered_in_one_sentence(work, args, parts):
    code, text = said(work, *args)
    assert code == 2, text
    assert text.startswith(f"hymba {args[0]}: ")
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text
    for jargon in ("NestedArg", "<class", "Union", "Parser key", "Namespace("):
        assert jargon not in text
    assert not (work / "run").exists(), "what is refused leaves no folder"


def test_a_path_may_lie_in_the_users_folder_wherever_it_is_written(work, monkeypatch):
    """No shell writes out the ~ in `--run_dir=~/a`, nor in a file."""
    home = work / "home"
    home.mkdir()
    (home / "more.yaml").write_text("checkpoint: {dirpath: ~/kept}\nexport: {enabled: true, filename: ~/small.hymba}\n")
    monkeypatch.chdir(home)  # where a folder named ~ would be made
    environment = {"HOME": str(home)}
    log = work / "log.home"
    args = ["fit", "--config", str(work / "tiny.yaml"), "--config=~/more.yaml", "--run_dir=~/run"]
    args += ["--trainer.max_steps", "2", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir=~/logs"]
    assert finish([start(args, log, environment)]) == [0], log_of(log)
    assert finish(
        [
            start(["inspect", "~/small.hymba"], log, environment),
            start(["report", "~/run", "--out=~/page"], log, environment),
        ]
    ) == [0, 0], log_of(log)
    assert {path.name for path in home.iterdir()} == {"more.yaml", "kept", "small.hymba", "run", "logs", "page"}


def test_debug_shows_where_an_error_comes_from(work):
    code, text = said(work, *FIT, "--debug", "--model.net.window", "0")
    assert code == 2
    assert "Traceback" in text
    assert text.splitlines()[-1] == "hymba fit: window must be at least 1, got 0"


def test_a_fault_of_the_program_is_called_one(work):
    code, text = said(
        work, "fit", "--config", "{}/tiny.yaml", "--run_dir", "{}/fault", hook=injected.a_fault_in_the_program
    )
    assert code == 1
    assert "Traceback" in text
    assert "ZeroDivisionError: the cooling failed. This is a fault of the program" in text.splitlines()[-1]


def test_a_finished_fit_says_what_comes_next(work):
    code, text = said(
        work,
        "fit",
        "--config",
        "{}/tiny.yaml",
        "--run_dir",
        "{}/done",
        "--trainer.max_steps",
        "2",
        "--export.enabled",
        "true",
    )
    assert code == 0
    commands = [line.partition("hymba ")[2].split() for line in text.splitlines() if "hymba " in line]
    assert [command[0] for command in commands] == ["test", "sample", "report"]
    code, text = said(work, *commands[0])
    assert code == 0, text
    assert "score-first TTT" in text


@pytest.mark.ddp
def test_of_two_ranks_the_first_speaks(work):
    from fit_process import start_ranks

    log = work / "ranks"
    args = [arg.replace("{}", str(work)) for arg in (*FIT, "--model.net.vocab_size", "512")]
    assert finish(start_ranks(args, log, 2)) == [2, 2]
    texts = [log_of(work / f"ranks.{rank}") for rank in range(2)]
    assert [text.count("hymba fit: the data's tokenizer has 1024 tokens") for text in texts] == [1, 0], texts
    assert "Traceback" not in texts[0] + texts[1]


def error_of(code: str, module: str) -> BaseException:
    """What `code` raises as if it stood in a module."""
    try:
        exec(code, {"__name__": module})
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize(
    ("code", "module", "users"),
    [
        ("raise ValueError('window is 0')", "hymba_lightning.model.config", True),
        ("raise FileExistsError('run/a holds a run')", "hymba_lightning.cli", True),
        ("int('abc')", "hymba_lightning.model.config", False),
        ("a, b = (1,)", "hymba_lightning.model.config", False),
        ("raise TypeError('x')", "hymba_lightning.model.config", False),
        ("raise ValueError('need at least one array')", "numpy.core", False),
        ("import torch; torch.zeros(2).view(3)", "hymba_lightning.model.config", False),
        ("raise ValueError('precision')", "lightning.pytorch.trainer.connectors.accelerator_connector", True),
        ("raise ValueError('no')", "lightning.pytorch.loops.fit_loop", False),
        ("open('/nowhere/x')", "torch.serialization", True),
        ("raise TimeoutError('gloo')", "torch.distributed", False),
        ("raise KeyError('x')", "hymba_lightning.cli", False),
        ("import torch; torch.empty(1 << 60)", "hymba_lightning.model.config", True),
    ],
)
def test_whose_fault_an_exception_is_follows_from_its_class_and_origin(code, module, users):
    assert errors.is_user_error(error_of(code, module)) is users


def test_refusals_of_the_package_are_bad_input():
    for make in (
        lambda: HymbaConfig(window=0),
        lambda: (_ for _ in ()).throw(BackendUnavailableError("x")),
        lambda: (_ for _ in ()).throw(errors.UserError("x")),
        lambda: Path("/nowhere/at/all").read_bytes(),
        lambda: torch.load(__file__, weights_only=True),
    ):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - each its own
            make()
        assert errors.is_user_error(raised.value), raised.value


def test_a_link_to_itself_is_bad_input_and_no_sentence_steers_a_terminal(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    try:
        raised = None
        (tmp_path / "loop" / "x").resolve(strict=True)
    except (RuntimeError, OSError) as error:
        raised = error
    assert errors.is_user_error(raised)
    assert errors.sentence(ValueError("\x1b[2Jgone\n\u202eback")).isprintable()


def test_a_compiler_that_the_system_lacks_is_named_with_how_to_go_on(tmp_path, monkeypatch):
    """torch.compile looks for one for C++, and Triton builds the module that starts its kernels."""
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    error = InductorError(InvalidCxxCompiler("g++"), None)
    assert errors.is_user_error(error)
    assert "install g++, name yours in CXX, or set model.compile to false" in errors.sentence(error)
    assert not errors.is_user_error(InductorError(KeyError("x"), None))
    output = "header.hpp:1:10: fatal error: Python.h: No such file or directory\ncompilation terminated."
    error = InductorError(CppCompileError(["g++", "header.hpp"], output), None)
    assert errors.is_user_error(error)
    assert "failed: install g++ and Python's headers (python3-dev), name another in CXX, or" in errors.sentence(error)
    assert errors.sentence(error).endswith("(header.hpp:1:10: fatal error: Python.h: No such file or directory)")

    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(Exception) as raised:  # noqa: PT011 - Triton's, or the system's
        build.compile_module_from_src("int main;", "nothing_of_ours")
    for error in (raised.value, InductorError(raised.value, None)):
        assert errors.is_user_error(error)
        assert "install gcc and Python's headers (python3-dev), or name your compiler in CC" in errors.sentence(error)


def test_a_sentence_is_one_line_that_names_the_file():
    with pytest.raises(OSError, match="Errno") as raised:
        Path("/nowhere/at/all").read_bytes()
    assert errors.sentence(raised.value) == "/nowhere/at/all: No such file or directory"
    assert errors.sentence(ValueError("one\n  two")) == "one two"
    assert "micro_batch_size" in errors.sentence(MemoryError())
    assert "micro_batch_size" in errors.sentence(error_of("import torch; torch.empty(1 << 60)", "torch"))


@pytest.mark.more
def test_a_config_of_a_run_is_yaml_with_every_letter(work):
    """A config with letters beyond ASCII is read in a C locale, too, and written back as it was."""
    config = work / "letters.yaml"
    config.write_text((work / "tiny.yaml").read_text(encoding="utf-8") + "# größer → ☃\n", encoding="utf-8")
    run = work / "läufe"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [
            *HYMBA,
            "fit",
            "--config",
            str(config),
            "--run_dir",
            str(run),
            "--trainer.max_steps",
            "2",
            "--export.enabled",
            "true",
        ],
        env=environment,
        capture_output=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["run_dir"] == str(run)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_such_backend"])
@pytest.mark.more
def test_a_plotting_backend_that_does_not_exist_is_none_of_ours(work, backend):
    """A notebook's kernel leaves its backend's name in the environment of what it starts."""
    environment = os.environ | {"MPLBACKEND": backend}
    options = ["--config", str(work / "tiny.yaml"), "--run_dir", str(work / "plots"), "--trainer.max_steps", "5"]
    done = subprocess.run(
        [*HYMBA, "fit", *options, "--summary.plots", "true", "--overwrite", "true"],
        env=environment,
        capture_output=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (work / "plots" / "training.png").stat().st_size > 10_000
