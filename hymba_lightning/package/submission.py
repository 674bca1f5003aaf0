"""`hymba package`: lays out a submission's folder, counts its bytes, and scores it there as a referee would."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_lightning.closure import ARCHIVE, EVALUATE, TRAINING_ONLY, evaluation_archive
from hymba_lightning.files import write_atomic
from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.package.digests import (
    ARTIFACT,
    DIGESTS,
    RESULT,
    SETTINGS,
    SUBMISSION,
    DigestError,
    describe,
    sha256,
    shorten,
    verify_folder,
)
from hymba_lightning.package.texts import LIMIT_BYTES, copy_logs, readme, train_log
from hymba_lightning.quantization import inspect_artifact
from hymba_lightning.quantization.artifact import read_parts
from hymba_lightning.report.reading import read_json, read_yaml
from hymba_lightning.report.runs import Run, flatten, load_runs
from hymba_lightning.run.record import FILE as RECORD
from hymba_lightning.run.record import ScoreRecord

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
    digests: dict[str, str]
    """SHA-256 of code, settings, artifact, data and tokenizer."""
    referee: dict[str, Any] | None
    """The folder's own score, of `evaluate.py`; None where it was not run."""

    @property
    def bytes(self) -> int:
        """Artifact and code."""
        return self.artifact_bytes + self.code_bytes

    @property
    def status(self) -> str:
        """Whether the folder was seen to score what it claims."""
        return "verified" if self.referee else "unverified"

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: artifact {self.artifact_bytes:,} + code {self.code_bytes:,} = {self.bytes:,} bytes, "
            f"{self.bytes / LIMIT_BYTES:.1%} of {LIMIT_BYTES:,}",
            f"  the run's score:  {self.run_bpb:.6f} bits per byte",
        ]
        if self.referee:
            lines.append(
                f"  the folder's own: {self.referee['val_bpb']:.6f}, in a clean environment, "
                f"{self.referee['seconds']:.1f} s on {self.referee['world_size']} × {self.referee['device']}"
            )
        else:
            lines.append("  unverified: the folder was not scored")
        return "\n".join(lines)


def package(
    run: str,
    out: str = "submission",
    name: str | None = None,
    author: str = "",
    github_id: str = "",
    blurb: str = "",
    data_dir: str | None = None,
    tokenizer: str | None = None,
    evaluate: bool = True,
    tolerance: float = 1e-4,
) -> Submission:
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
        evaluate: Score the folder; without it only layout, bytes and digests are checked, and the submission is
            marked as unverified.
        tolerance: Most bits per byte by which that score may differ from the run's.

    Raises:
        FileNotFoundError: the run has no artifact or was not tested.
        FileExistsError: `out` holds something.
        SubmissionError: the run's score is not of this artifact, artifact and code exceed the limit, the evaluation
            fails, or gives another score. Nothing is left at `out` then.
    """
    loaded, folder = load_runs([run])[0], Path(out).expanduser()
    tested = _proven_score(loaded)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose another folder")
    options = _test_options(loaded)
    data, model = _sources(options, data_dir, tokenizer)
    # Whole or not at all: laid out beside its place, and moved there as the last step.
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{secrets.token_hex(6)}"
    try:
        building.mkdir()
        result = _lay_out(building, loaded, tested, options, name or loaded.name)
        about = {
            "author": author,
            "github_id": github_id,
            "name": name or loaded.name,
            "blurb": blurb,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),  # noqa: UP017
            "val_loss": tested.loss,
            "val_bpb": tested.bpb,
            "bytes_total": result.bytes,
            "bytes_code": result.code_bytes,
        }
        _write_about(building, loaded, about, result)
        if evaluate:
            result = dataclasses.replace(result, referee=_referee_score(building, data, model, tested, tolerance))
            _write_about(building, loaded, about, result)
        try:
            # Takes the place of an empty folder, and of no other.
            building.rename(folder)
        except OSError as error:
            if folder.exists():
                raise FileExistsError(f"{folder} holds something by now: choose another folder") from error
            raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return dataclasses.replace(result, folder=folder)


def _proven_score(run: Run) -> ScoreRecord:
    """The run's score of the artifact that lies in its folder.

    Raises:
        FileNotFoundError: the run has no artifact or was not tested.
        SubmissionError: artifact, record and test_summary.json do not belong together.
    """
    recorded = run.record.artifact
    artifact = run.folder / (recorded.file if recorded else ARTIFACT)
    why = "".join(f"; {note}" for note in run.notes)
    if not artifact.is_file():
        raise FileNotFoundError(f"{run.folder} has no {ARTIFACT}: let `hymba fit` export it")
    found = sha256(artifact)
    if recorded is not None and found != recorded.sha256:
        raise SubmissionError(
            f"{artifact} is not the artifact that the fit exported (SHA-256 {found}, {RECORD} has "
            f"{recorded.sha256}): put that one back, or test this one in a folder of its own{why}"
        )
    if run.artifact is None:
        raise SubmissionError(f"{artifact} cannot be packaged{why}")
    remedy = f"run `hymba test --run_dir {run.folder} --ckpt_path {artifact}` first"
    if run.tested is None or run.tested.data is None:
        raise FileNotFoundError(f"{run.folder} has no score of its artifact in {RECORD}: {remedy}{why}")
    if run.tested.weights != found:
        raise SubmissionError(f"{run.folder} was tested with other weights than {ARTIFACT}: {remedy}")
    shown = read_json(run.folder / "test_summary.json", []).get("ttt_bpb")
    if shown is not None and "ttt_bpb" not in run.test:
        raise SubmissionError(
            f"test_summary.json says {shown} bits per byte, {RECORD} {run.tested.bpb:.6f}: {remedy}{why}"
        )
    missing = {"seq_len", "chunk_tokens", "ttt"} - run.tested.settings.keys()
    if missing:
        raise SubmissionError(f"{RECORD} in {run.folder} lacks the test's {', '.join(sorted(missing))}: {remedy}")
    return run.tested


def _sources(options: dict[str, Any], data_dir: str | None, tokenizer: str | None) -> tuple[Path, Path]:
    """Folder of the validation shards and tokenizer; a pattern with folders of its own brings its data."""
    files = str(options.get("data.val_files") or "")
    known = Path(files).parent if Path(files).is_absolute() else options.get("data.data_dir") or "data"
    data = Path(data_dir or known).expanduser().resolve()
    model = tokenizer or options.get("data.tokenizer")
    return data, Path(model or Path(options.get("data.data_dir") or data) / "tokenizer.model").expanduser().resolve()


def _lay_out(folder: Path, run: Run, tested: ScoreRecord, options: dict[str, Any], title: str) -> Submission:
    """Everything but what depends on the referee's score.

    Raises:
        SubmissionError: artifact and code exceed the limit.
    """
    recorded = run.record.artifact
    shutil.copyfile(run.folder / (recorded.file if recorded else ARTIFACT), folder / ARTIFACT)
    code = _write_code(folder)
    copy_logs(run, folder / "logs")
    write_atomic(folder / "train.log", train_log(run))
    write_atomic(folder / SETTINGS, json.dumps(_settings(tested, options), indent=1) + "\n")
    assert tested.data is not None
    data = dataclasses.asdict(tested.data) | {"tokens": tested.tokens, "bytes": tested.bytes}
    logs = [path.relative_to(folder) for path in (folder / "train.log", *(folder / "logs").iterdir())]
    digests = describe(folder, code, logs, data)
    if digests["artifact"] != tested.weights:
        raise SubmissionError(f"{run.folder / ARTIFACT} changed while it was copied: package again")
    write_atomic(folder / DIGESTS, json.dumps(digests, indent=1) + "\n")
    sizes = (folder / ARTIFACT).stat().st_size, sum((folder / file).stat().st_size for file in code)
    if sum(sizes) > LIMIT_BYTES:
        raise SubmissionError(
            f"{title}: {sum(sizes):,} bytes are {sum(sizes) - LIMIT_BYTES:,} over {LIMIT_BYTES:,}; "
            f"export with a lower limit.\n{inspect_artifact(folder / ARTIFACT)[1].table()}"
        )
    return Submission(folder, *sizes, tested.bpb, shorten(digests), None)


def _referee_score(folder: Path, data: Path, tokenizer: Path, tested: ScoreRecord, tolerance: float) -> dict[str, Any]:
    """What the folder says that it scores. Raises SubmissionError where that is not what the run's test says."""
    # Compared below, in the words of who packages.
    referee = run_referee(folder, data, tokenizer, int(tested.settings.get("world_size") or 1), math.inf)
    difference = abs(referee["val_bpb"] - tested.bpb)
    # Written so that NaN is refused too.
    if not difference <= tolerance:
        raise SubmissionError(
            f"the submission scores {referee['val_bpb']:.6f} bits per byte, the run's test "
            f"{tested.bpb:.6f}: {difference:.6f} apart, more than {tolerance:g}. Are the data and "
            "the artifact those of the test?"
        )
    return referee


def _write_about(folder: Path, run: Run, about: dict[str, Any], made: Submission) -> None:
    referee = made.referee and {
        "val_bpb": made.referee["val_bpb"],
        "seconds": made.referee["seconds"],
        "world_size": made.referee["world_size"],
        "device": made.referee["device"],
    }
    content = about | {"status": made.status, "referee": referee, "digests": made.digests}
    write_atomic(folder / SUBMISSION, json.dumps(content, indent=2) + "\n")
    ranks = int(run.tested.settings.get("world_size") or 1) if run.tested else 1
    launch = f"torchrun --standalone --nproc-per-node={ranks}" if ranks > 1 else "python"
    write_atomic(folder / "README.md", readme(run, content, launch))


def run_referee(
    folder: Path, data: Path, tokenizer: Path, world_size: int = 1, tolerance: float = 1e-3
) -> dict[str, Any]:
    """Copies the folder elsewhere and runs its evaluate.py with nothing of this process's environment or package.

    Raises SubmissionError where the folder is not what its digests say, with the end of the output where evaluate.py
    fails, or where that used other code than the folder's.
    """
    try:
        verify_folder(folder)
    except DigestError as error:
        raise SubmissionError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="hymba-referee-") as temporary:
        copy = Path(temporary).resolve() / "submission"
        shutil.copytree(folder, copy)
        environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        # The code is unpacked in there, where its origin is looked at below.
        environment |= {"HOME": temporary, "TMPDIR": temporary}
        # -I: neither the caller's folder, nor PYTHONPATH, nor packages of the user.
        command = [sys.executable, "-I"]
        if world_size > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += [
            str(copy / "evaluate.py"),
            "--data",
            str(data),
            "--tokenizer",
            str(tokenizer),
            "--out",
            str(Path(temporary) / RESULT),
            "--tolerance",
            str(tolerance),
        ]
        done = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SubmissionError(
                f"evaluate.py in {folder} ended with code {done.returncode}:\n"
                + "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            )
        result = json.loads((Path(temporary) / RESULT).read_bytes())
        here = Path(temporary).resolve()
        strangers = [file for file in result.pop("modules") if here not in Path(file).resolve().parents]
        if strangers:
            raise SubmissionError(
                f"evaluate.py took code from elsewhere than the submission's folder, which lacks it: {strangers[0]}"
            )
    return result


def _write_code(folder: Path) -> list[Path]:
    """Writes evaluate.py and the archive of the modules that it needs for the folder's artifact; their paths in it."""
    mixer = HymbaConfig.from_dict(read_parts(folder / ARTIFACT).header["config"]).mixer
    write_atomic(folder / "evaluate.py", EVALUATE)
    write_atomic(folder / ARCHIVE, evaluation_archive(mixer))
    return [Path("evaluate.py"), Path(ARCHIVE)]


def _test_options(run: Run) -> dict[str, Any]:
    """The options of the run's test or, where it had none, of its fit, by their dotted names."""
    notes: list[str] = []
    for file in ("test_config.yaml", "config.yaml"):
        options = flatten(read_yaml(run.folder / file, notes))
        if options:
            return options
    raise FileNotFoundError(
        f"{run.folder} has no readable test_config.yaml: run `hymba test` again"
        + "".join(f"; {note}" for note in notes)
    )


def _settings(tested: ScoreRecord, options: dict[str, Any]) -> dict[str, Any]:
    prefix = "model.runtime."
    runtime = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    ops = {field.name: field.metadata.get("op", "") for field in dataclasses.fields(RuntimeConfig)}
    files = options.get("data.val_files") or "*_val_*.bin"
    return {
        "seq_len": tested.settings["seq_len"],
        "chunk_tokens": tested.settings["chunk_tokens"],
        "ttt": tested.settings["ttt"],
        "val_tokens_limit": options.get("data.val_tokens_limit"),
        "val_files": Path(files).name if Path(files).expanduser().is_absolute() else files,
        "runtime": {key: _in_archive(ops[key], value) for key, value in runtime.items() if key in ops},
    }


def _in_archive(op: str, value: Any) -> Any:
    """The value of an option that may name a backend of `op`: 'auto' for one that the archive does not have."""
    missing = [entry for entry in TRAINING_ONLY if entry.endswith(f".backend_{value}")]
    return "auto" if op and any(op.startswith(entry.partition(".")[0]) for entry in missing) else value
