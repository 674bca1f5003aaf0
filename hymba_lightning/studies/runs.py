"""Runs of the `hymba` command for studies: each in a process of its own, not run again where its result is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_lightning.studies.worker import Worker


def run_once(
    command: str,
    run_dir: Path,
    result: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    worker: Worker | None = None,
) -> dict[str, Any]:
    """The JSON file `result` of `hymba <command> --run_dir <run_dir>`, from an earlier call or from one made now.

    `environment` is added to this process's; a `worker` has its own. A fit that was interrupted goes on from its
    checkpoint. The output goes to <run_dir>/<command>.log. Raises RuntimeError with the log's end where the
    command fails.
    """
    path = run_dir / result
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        resume: list[str] = []
        if command == "fit":
            killed = (run_dir / "checkpoints" / "last.ckpt").is_file()
            resume = ["--ckpt_path", "last"] if killed else ["--overwrite", "true"]
        line = [command, "--run_dir", str(run_dir), *arguments, *resume]
        started, log = time.monotonic(), run_dir / f"{command}.log"
        if worker is not None:
            code = worker.run(line, log)
        else:
            with open(log, "a", encoding="utf-8") as file:
                code = subprocess.run(
                    [sys.executable, "-m", "hymba_lightning", *line],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env=os.environ | dict(environment or {}),
                ).returncode
        if code or not path.is_file():
            # A crash in C++ ends with dozens of addresses; what went wrong stands above them.
            text = log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if not line.startswith("frame #")]
            tail = "\n".join(lines[-15:])
            raise RuntimeError(f"hymba {command} in {run_dir} ended with code {code}:\n{tail}")
        print(f"{run_dir.name}: {command} in {time.monotonic() - started:.0f} s", flush=True)
    return json.loads(path.read_bytes())


def artifact_of(run_dir: Path) -> Path | None:
    """The file that a finished fit exported, whatever its name; None where it exported none."""
    name = json.loads((run_dir / "summary.json").read_bytes()).get("artifact")
    return None if name is None or not (run_dir / name).is_file() else run_dir / name


def hardware(environment: dict[str, Any]) -> str:
    """A line that says what the numbers were measured on."""
    return (
        f"{environment['world_size']} × {environment['device']}, torch {environment['torch']}, hymba_lightning "
        f"{environment['hymba_lightning']}"
    )
