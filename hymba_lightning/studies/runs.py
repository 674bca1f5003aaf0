"""Runs of the `hymba` command for studies: each in a process of its own, not run again where its result is there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.claim import FolderClaim
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.files import write_atomic
from hymba_lightning.options import settings_file
from hymba_lightning.studies.worker import Worker


class RunFailedError(RuntimeError):
    """A run of the `hymba` command ended with an error; the text has the end of its log."""


def run_once(
    command: str,
    run_dir: Path,
    result: str,
    arguments: Sequence[str],
    *,
    beside: Sequence[str] = (),
    worker: Worker | None = None,
) -> dict[str, Any]:
    """The JSON file `result` of `hymba <command> --run_dir <run_dir>`, from an earlier call or from one made now.

    A fit that was interrupted goes on from its checkpoint. The output goes to <run_dir>/<command>.log.

    Args:
        command: "fit" or "test".
        run_dir: The run's folder.
        result: A file in it, which is there when the command has ended well.
        arguments: Options of the command. They are kept in <run_dir>/<command>_arguments.json, with the SHA-256 of each
            config file.
        beside: More of them, which the result does not depend on.
        worker: Of several runs; without one the command has a process of its own.

    Raises:
        RunFailedError: the command failed.
        FolderInUseError: another process writes to the folder.
        ValueError: what is there already was made with other arguments.
    """
    path = run_dir / result
    killed = command == "fit" and (run_dir / "checkpoints" / "last.ckpt").is_file()
    others = other_options(made_with(run_dir, command), arguments)
    if (path.is_file() or killed) and others:
        raise ValueError(
            f"{run_dir} holds a run with other options ({others} is asked for now): give those again, "
            "another name or folder, or delete it"
        )
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        kept, given = run_dir / f"{command}_arguments.json", json.dumps(identified(arguments)) + "\n"
        with FolderClaim(run_dir, "hymba study"):
            write_atomic(kept, given)
        resume: list[str] = []
        if command == "fit":
            resume = ["--ckpt_path", "last"] if killed else ["--overwrite", "true"]
        line = [command, "--run_dir", str(run_dir), *arguments, *beside, *resume]
        started, log = time.monotonic(), run_dir / f"{command}.log"
        code = _run(line, log) if worker is None else worker.run(line, log)
        if code or not path.is_file():
            # A crash in C++ ends with dozens of addresses; what went wrong stands above them.
            text = log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if not line.startswith("frame #")]
            tail = "\n".join(lines[-15:])
            raise RunFailedError(f"hymba {command} in {run_dir} ended with code {code}:\n{tail}")
        # Another study may have said what it wanted here before its run was refused the folder.
        write_atomic(kept, given)
        print(f"{run_dir.name}: {command} in {time.monotonic() - started:.0f} s", flush=True)
    return read_json(path)


def made_with(run_dir: Path, command: str) -> list[str] | None:
    """The arguments that `run_once` gave the command there, None where it did not."""
    kept = run_dir / f"{command}_arguments.json"
    return read_json(kept, list) if kept.is_file() else None


def identified(arguments: Sequence[str]) -> list[str]:
    """The arguments with each config file's SHA-256 behind its name: an edited file makes another run."""
    words = [""]
    for word in arguments:
        option, equals, name = word.rpartition("--config=") if word.startswith("--config=") else ("", "", word)
        path = settings_file(name) if equals or words[-1] == "--config" else None
        known = path is not None and path.is_file()
        words.append(f"{option}{equals}{name} (sha256 {file_sha256(path)[:16]})" if path and known else word)
    return words[1:]


def other_options(made: list[str] | None, asked: Sequence[str]) -> str:
    """How the options that a run was `made` with differ from those that are asked for, "a where b"; "" where they do
    not, or nobody knows. Runs of before the config files' digests were kept are known by the files' names."""
    now = identified(asked)
    if made is None or made in (now, list(asked)):
        return ""
    was, new = _options(made), _options(now)
    gone = " ".join(option for option in was if option not in new) or "nothing"
    return f"{gone} where {' '.join(option for option in new if option not in was) or 'nothing'}"


def _options(arguments: Sequence[str]) -> list[str]:
    """["--a", "1", "--b", "2"] → ["--a 1", "--b 2"]."""
    options: list[str] = []
    for word in arguments:
        if word.startswith("--") or not options:
            options.append(word)
        else:
            options[-1] += f" {word}"
    return options


def same_text(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two scores, as a summary has them, are of the same text, as far as they say: of the same tokens, or by
    different tokenizers over as many bytes."""
    known = all(isinstance(each, Mapping) and each.get("data") for each in (a, b))
    if known and a.get("tokenizer") != b.get("tokenizer"):
        return a.get("bytes") == b.get("bytes")
    return not known or all(a.get(key) == b.get(key) for key in ("data", "tokens"))


def check_same_text(scores: Mapping[Path, Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: A run, of these folders, was scored on other text than the first one.
    """
    (first, score), *others = scores.items()
    for folder, other in others:
        if not same_text(score, other):
            raise ValueError(
                f"{folder} was scored on other text than {first}, as when data were prepared anew in between: delete "
                "one of them, or give another folder for the runs"
            )


def _run(line: Sequence[str], log: Path) -> int:
    """`hymba <line>` in a process of its own, its output appended to `log`; the exit code.

    What interrupts this process lets that one save what it has.
    """
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hymba_lightning", *line],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def artifact_of(run_dir: Path) -> Path | None:
    """The file that a finished fit exported, whatever its name; None where it exported none."""
    name = read_json(run_dir / "summary.json").get("artifact")
    return None if name is None or not (run_dir / name).is_file() else run_dir / name


def check_subject(out: Path, subject: Mapping[str, Any]) -> None:
    """Keeps, beside the results in `out`, what they are of, for the next call.

    Raises:
        ValueError: what is there is of something else, and would stand in one table with what is asked for now.
    """
    path = out / "measured_on.json"
    if path.is_file() and (out / "results.json").is_file():
        before = read_json(path)
        other = [
            f"{name} {before.get(name)}, now {subject[name]}" for name in subject if before.get(name) != subject[name]
        ]
        if other:
            raise ValueError(
                f"{out} holds results of something else ({'; '.join(other)}): give another folder, or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(subject, indent=1) + "\n")


def hardware(environment: dict[str, Any]) -> str:
    """A line that says what the numbers were measured on."""
    return (
        f"{environment['world_size']} × {environment['device']}, torch {environment['torch']}, hymba_lightning "
        f"{environment['hymba_lightning']}"
    )


def read_json(path: Path, kind: type = dict, keys: Sequence[str] = ()) -> Any:
    """What a study's file or a run's summary holds: of this kind, with these keys.

    Raises ValueError naming a file that is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and what it is of is done again") from error
    fits = isinstance(content, kind)
    if not fits or any(key not in content for key in keys):
        what = f"it lacks {', '.join(keys)}" if fits else f"it is no {kind.__name__}"
        raise ValueError(f"{path} is damaged ({what}): delete it, and what it is of is done again")
    return content
