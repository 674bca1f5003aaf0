"""`hymba package`: lays out a submission's folder, counts its bytes, and scores it there as a referee would."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_lightning.closure import ROOT, needed_files
from hymba_lightning.files import write_atomic
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.package.referee import ARTIFACT, RESULT, SETTINGS
from hymba_lightning.quantization import inspect_artifact
from hymba_lightning.report.runs import STAGES, Run, load_runs

LIMIT_BYTES = 16_000_000
LOGS = ("summary.json", "test_summary.json", "history.json", "config.yaml", "test_config.yaml", "fit.log", "test.log")
EVALUATE = '''"""Scores artifact.hymba of this folder: python evaluate.py --data FOLDER_OF_SHARDS [--tokenizer MODEL]"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from hymba_lightning.package.referee import main  # noqa: E402

main(FOLDER)
'''
# What a clean environment still needs to find the interpreter's libraries and the GPU.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SYSTEMROOT")


class SubmissionError(ValueError):
    """The folder is over the limit, or its score is not the run's."""


@dataclass(frozen=True)
class Submission:
    """A folder that was written."""

    folder: Path
    artifact_bytes: int
    code_bytes: int
    run_bpb: float
    referee: dict[str, Any] | None
    """The folder's own score, of `evaluate.py`; None where it was not run."""

    def __str__(self) -> str:
        total = self.artifact_bytes + self.code_bytes
        lines = [f"{self.folder}: artifact {self.artifact_bytes:,} + code {self.code_bytes:,} = {total:,} bytes, "
                 f"{total / LIMIT_BYTES:.1%} of {LIMIT_BYTES:,}",
                 f"  the run's score:  {self.run_bpb:.6f} bits per byte"]
        if self.referee:
            lines.append(f"  the folder's own: {self.referee['val_bpb']:.6f}, in a clean environment, "
                         f"{self.referee['seconds']:.1f} s on {self.referee['world_size']} × {self.referee['device']}")
        return "\n".join(lines)


def package(run: str, out: str = "submission", name: str | None = None, author: str = "", github_id: str = "",
            blurb: str = "", data_dir: str | None = None, tokenizer: str | None = None, evaluate: bool = True,
            tolerance: float = 1e-4) -> Submission:
    """Lays out the challenge's folder for a run, and scores it from there in a clean environment.

    Args:
        run: Folder of a run that was fitted, exported and tested.
        out: Folder to write; must not exist, or be empty.
        name: Title of the submission (default: the run's folder).
        author: Its author.
        github_id: The author's account.
        blurb: A sentence on what it does.
        data_dir: Validation shards for the evaluation (default: the run's).
        tokenizer: SentencePiece model (default: the run's).
        evaluate: Score the folder; without it only layout and bytes are checked.
        tolerance: Most bits per byte by which that score may differ from the run's.

    Raises:
        FileNotFoundError: the run has no artifact or was not tested.
        FileExistsError: `out` holds something.
        SubmissionError: artifact and code exceed the limit, the evaluation fails, or gives another score.
    """
    loaded, folder = load_runs([run])[0], Path(out).expanduser()
    artifact = loaded.folder / ARTIFACT
    if loaded.artifact is None or not artifact.is_file():
        raise FileNotFoundError(f"{loaded.folder} has no {ARTIFACT}: let `hymba fit` export it")
    if "ttt_bpb" not in loaded.test:
        raise FileNotFoundError(f"{loaded.folder} has no score of its artifact: run `hymba test --run_dir "
                                f"{loaded.folder} --ckpt_path {artifact}` first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose another folder")
    options = _test_options(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    code = _copy_code(folder)
    shutil.copyfile(artifact, folder / ARTIFACT)
    (folder / "logs").mkdir()
    for file in LOGS:
        if (loaded.folder / file).is_file():
            shutil.copyfile(loaded.folder / file, folder / "logs" / file)
    write_atomic(folder / "train.log", _train_log(loaded))
    write_atomic(folder / SETTINGS, json.dumps(_settings(loaded, options), indent=1) + "\n")
    sizes = artifact.stat().st_size, sum((folder / file).stat().st_size for file in code)
    result = Submission(folder, *sizes, loaded.test["ttt_bpb"], None)
    title = name or loaded.name
    about = {"author": author, "github_id": github_id, "name": title, "blurb": blurb,
             "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),  # noqa: UP017
             "val_loss": loaded.test["ttt_loss"], "val_bpb": loaded.test["ttt_bpb"], "bytes_total": sum(sizes),
             "bytes_code": sizes[1]}
    write_atomic(folder / "submission.json", json.dumps(about, indent=2) + "\n")
    write_atomic(folder / "README.md", _readme(loaded, title, blurb, result))
    if sum(sizes) > LIMIT_BYTES:
        raise SubmissionError(f"{folder}: {sum(sizes):,} bytes are {sum(sizes) - LIMIT_BYTES:,} over {LIMIT_BYTES:,}; "
                              f"export with a lower limit.\n{inspect_artifact(artifact)[1].table()}")
    if not evaluate:
        return result
    data = Path(data_dir or options["data.data_dir"]).expanduser().resolve()
    model = Path(tokenizer or options.get("data.tokenizer") or data / "tokenizer.model").expanduser().resolve()
    referee = run_referee(folder, data, model, int(loaded.test["environment"]["world_size"]))
    result = dataclasses.replace(result, referee=referee)
    difference = abs(referee["val_bpb"] - loaded.test["ttt_bpb"])
    if difference > tolerance:
        raise SubmissionError(f"{folder} scores {referee['val_bpb']:.6f} bits per byte, the run's test "
                              f"{loaded.test['ttt_bpb']:.6f}: {difference:.6f} apart, more than {tolerance:g}. Are the "
                              "data and the artifact those of the test?")
    return result


def run_referee(folder: Path, data: Path, tokenizer: Path, world_size: int = 1) -> dict[str, Any]:
    """Copies the folder elsewhere and runs its evaluate.py with nothing of this process's environment or package.

    Raises SubmissionError with the end of its output where it fails, or where it used other code than the folder's.
    """
    with tempfile.TemporaryDirectory(prefix="hymba-referee-") as temporary:
        copy = Path(temporary).resolve() / "submission"
        shutil.copytree(folder, copy)
        environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ} | {"HOME": temporary}
        # -I: neither the caller's folder, nor PYTHONPATH, nor packages of the user.
        command = [sys.executable, "-I"]
        if world_size > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += [str(copy / "evaluate.py"), "--data", str(data), "--tokenizer", str(tokenizer), "--out",
                    str(Path(temporary) / RESULT)]
        done = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SubmissionError(f"evaluate.py in {folder} ended with code {done.returncode}:\n"
                                  + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
        result = json.loads((Path(temporary) / RESULT).read_bytes())
        strangers = [file for file in result.pop("modules") if copy not in Path(file).parents]
        if strangers:
            raise SubmissionError(f"evaluate.py took code from elsewhere than the submission's folder, which lacks it: "
                                  f"{strangers[0]}")
    return result


def _copy_code(folder: Path) -> list[Path]:
    """Writes evaluate.py and the modules that it needs; their paths in the folder."""
    files = needed_files("hymba_lightning.package.referee")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT.parent / file, folder / file)
    write_atomic(folder / "evaluate.py", EVALUATE)
    return [Path("evaluate.py"), *files]


def _test_options(run: Run) -> dict[str, Any]:
    import yaml

    from hymba_lightning.report.runs import flatten

    path = run.folder / "test_config.yaml"
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else run.config


def _settings(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    prefix = "model.runtime."
    runtime = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    known = {field.name for field in dataclasses.fields(RuntimeConfig)}
    return {"seq_len": run.test["seq_len"], "chunk_tokens": run.test["chunk_tokens"], "ttt": run.test["ttt"],
            "val_tokens_limit": options.get("data.val_tokens_limit"),
            "val_files": options.get("data.val_files", "*_val_*.bin"),
            "runtime": {key: value for key, value in runtime.items() if key in known}}


def _train_log(run: Run) -> str:
    """The history as lines of text."""
    lines = [f"step:{row['step']} train_loss:{row['loss']:.4f} train_time:{1000 * row['seconds']:.0f}ms "
             f"tok/s:{row['tokens_per_s']:.0f} lr_scale:{row['lr_scale']:.4f}" for row in run.train]
    lines += [f"step:{row['step']} val_loss:{row['loss']:.4f} val_bpb:{row['bpb']:.4f} "
              f"train_time:{1000 * row['seconds']:.0f}ms" for row in run.val]
    lines += [f"final {stage} val_bpb:{bpb:.6f}" for stage, bpb in run.stages.items()]
    return "\n".join(lines) + "\n"


def _readme(run: Run, title: str, blurb: str, made: Submission) -> str:
    stages = "\n".join(f"| {STAGES[stage]} | {bpb:.4f} |" for stage, bpb in run.stages.items())
    environment = run.environment
    ranks = int(run.test["environment"]["world_size"])
    launch = f"torchrun --standalone --nproc-per-node={ranks}" if ranks > 1 else "python"
    return f"""# {title}

{blurb}

| stage | val_bpb |
|---|---|
{stages}

{run.summary.get('parameters', 0):,} parameters, {run.summary.get('steps', 0):,} steps in \
{run.summary.get('train_seconds', 0.0):.1f} s on {environment.get('world_size')} × {environment.get('device')}. \
Artifact {made.artifact_bytes:,} bytes, code {made.code_bytes:,} bytes, {made.artifact_bytes + made.code_bytes:,} of \
{LIMIT_BYTES:,}. Evaluation: {run.test['seconds']:.1f} s, {run.test['context']}.

## Score it

    {launch} evaluate.py --data FOLDER_OF_SHARDS --tokenizer TOKENIZER.model

needs torch, numpy, sentencepiece and zstandard (numba besides on a CPU). The tokens are scored once, left to right, in
chunks of {run.test['chunk_tokens']:,}; the network trains on a chunk only after its score is final.

Training: logs/config.yaml with `hymba fit` of hymba_lightning; train.log and logs/ have its history.
"""
