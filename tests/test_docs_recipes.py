"""docs/recipes.md runs as it stands, at toy size: its commands, its SLURM script with a stand-in for srun."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fit_process import finish, log_of, start
from tiny import NET

from hymba_lightning.commands import run_command
from hymba_lightning.run.record import RunRecord

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
YAML = dict(re.findall(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
(SLURM,) = re.findall(r"^```bash slurm\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TEXT = "Once upon a time there was a king. He had three sons; the youngest was a fool, and said so.\n"
TOY = {
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 1},
    "model": {
        "net": {key: value for key, value in NET.items() if key != "vocab_size"},
        "budget_seconds": None,
        "reserve_seconds": 0,
        "compile": False,
        "compile_warmup_steps": 0,
        "runtime": {"compute_dtype": "float32"},
    },
    "data": {"seq_len": 64, "micro_batch_size": 1},
    "summary": {"plots": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, the configs' names and the page's YAML files; configs are cut down to toy size."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("my_texts", "more_texts", "litgpt/data/textfiles"):
        (folder / name).mkdir(parents=True)
        for number in range(60):
            words = " ".join(f"word{number}{k} thing{k * 7 % 31}" for k in range(20))
            (folder / name / f"{number}.txt").write_text(f"{name} {number}\n" + TEXT * 4 + words, encoding="utf-8")
    (folder / "nanoGPT/data/shakespeare_char").mkdir(parents=True)
    (folder / "nanoGPT/data/shakespeare_char/input.txt").write_text(TEXT * 200, encoding="utf-8")
    (folder / "configs").mkdir()
    for config in ("demo.yaml", "hymba_32k.yaml"):
        (folder / "configs" / config).write_text(yaml.safe_dump(TOY), encoding="utf-8")
    for name, text in YAML.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(capsys, commands):
    """Runs commands in the current folder, `fit` in a process of its own; returns what the last one printed."""
    log = Path("fit.log").resolve()
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "hymba"
        # The vocabulary that a few kilobytes of text can fill.
        arguments = ["400" if word in ("1024", "512") else word for word in arguments]
        capsys.readouterr()
        if arguments[0] != "fit":
            run_command(arguments[0], arguments[1:])
            continue
        if "--start_from" not in arguments:
            arguments += ["--model.net.vocab_size", "400"]
        assert finish([start(arguments, log)]) == [0], f"{command}\n{log_of(log)[-2000:]}"
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.more
def test_every_command_runs(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    own, tuning, layouts, logger = (block.splitlines() for block in BLOCKS)
    assert run(capsys, own).startswith("Once upon a time")
    (cell,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(cell, "a notebook's cell", "exec"), {})
    assert "[1] Once upon a time" in capsys.readouterr().out
    assert "all 60 documents" in run(capsys, tuning)
    run(capsys, layouts)
    assert (place / "data" / "textfiles" / "manifest.json").is_file()
    run(capsys, logger)
    assert list((place / "logs").rglob("metrics.csv"))


@pytest.mark.slow
@pytest.mark.more
def test_the_slurm_script_fits_and_goes_on(place, capsys, monkeypatch):
    """`srun` stands for one task; the second time the script finds the checkpoint."""
    monkeypatch.chdir(place)
    run(capsys, BLOCKS[0].splitlines()[:1])
    (place / "bin").mkdir()
    srun, hymba = place / "bin" / "srun", place / "bin" / "hymba"
    srun.write_text('#!/bin/bash\nexec "$@" --model.net.vocab_size 400\n')
    hymba.write_text(f'#!/bin/bash\necho "$@" >> calls\nexec {shlex.quote(sys.executable)} -m hymba_lightning "$@"\n')
    for file in (srun, hymba):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", SLURM], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (place / "calls").read_text().splitlines()
    assert "--ckpt_path" not in first
    assert "--ckpt_path last" in second
    assert RunRecord.load(place / "runs" / "slurm").trained.steps == 2


@pytest.mark.parametrize(
    ("name", "package"), [("wandb.yaml", "wandb"), ("mlflow.yaml", "mlflow"), ("csv.yaml", "torch")]
)
def test_the_loggers_are_what_lightning_makes(name, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    import lightning.pytorch.loggers as loggers

    monkeypatch.chdir(tmp_path)
    spec = yaml.safe_load(YAML[name])["trainer"]["logger"]
    logger = getattr(loggers, spec["class_path"].rpartition(".")[2])(**spec["init_args"])
    assert logger.name or logger.experiment is not None
