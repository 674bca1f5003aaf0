"""One process for many runs on one device: what is imported, compiled and autotuned for one serves the next.

`python -m hymba_lightning.studies.worker` reads a line of JSON for each run from its standard input,
{"arguments": [...], "log": path}, and answers with a line {"code": 0 or 1} when the run has ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

# Graphs of networks and shapes that one process may hold; torch's own limit of 8 would leave the ninth uncompiled.
GRAPHS = 256
# Commands that compile.
TRAINING = ("fit", "validate", "test")


class Worker:
    """The other end of such a process, started at the first run and again after one that failed.

    Args:
        environment: added to this process's, e.g. CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = dict(environment or {})
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """`hymba <arguments>` with its output appended to `log`; returns the exit code.

        A failed run ends the process: its device may be in any state.
        """
        if self._process is None:
            line = [sys.executable, "-m", "hymba_lightning.studies.worker"]
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=os.environ | self.environment,
                start_new_session=True,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        code = json.loads(answer)["code"] if answer else self._process.wait()
        if code or not answer:
            self.close()
        return code

    def stop(self) -> None:
        """Ends the run in progress, which saves its checkpoint first. Called from another thread than `run`."""
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
        self._process = None


def run_here(arguments: list[str]) -> int:
    """One command in this process, as `python -m hymba_lightning` would run it. Returns its exit code."""
    sys.argv = ["hymba", *arguments]
    # Each command puts its own around these.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    try:
        runpy.run_module("hymba_lightning", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def allow_graphs() -> None:
    """Lets torch.compile keep the graphs of all the runs to come."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS


def free_memory() -> None:
    """Frees the memory of the last run's tensors, on the GPU too."""
    gc.collect()
    if "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(requests: TextIO) -> None:
    """Runs what `requests` ask for until they end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in requests:
        request = json.loads(line)
        # Not sys.stdout alone: libraries in C++ write to the descriptors.
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        if request["arguments"][0] in TRAINING:
            allow_graphs()
        code = run_here(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        free_memory()
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin)
