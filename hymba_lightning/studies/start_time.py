"""What lies before the first counted step of `hymba fit`, and after the last: once with empty compile caches, then with
the caches that this left."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hymba_lightning.files import write_atomic
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import hardware, made_with, read_json, run_once
from hymba_lightning.studies.variants import options

# What torch, Triton and numba keep what they compiled in.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR")
# In --out, beside the runs: those caches, and what was measured.
CACHE_FOLDER, STARTS = "caches", "starts.json"


@dataclass(frozen=True)
class Start:
    """Seconds of one fit."""

    caches: str
    """"cold" or "warm"."""
    launch: float
    """Before the command's own clock: the interpreter."""
    start: float
    """Imports, options, network, ranks."""
    data: float
    warm_up: float
    """Steps before the clock, which compile."""
    training: float
    rest: float
    """After the last step, the process's end included."""

    @property
    def first_step(self) -> float:
        """From the start of the process to the first counted step."""
        return self.launch + self.start + self.data + self.warm_up


def start_of(caches: str, process_seconds: float, summary: dict[str, Any], ending: float = 0.0) -> Start:
    """The figures of a fit whose process took `process_seconds`, `ending` of them behind its summary."""
    phases = summary["phases"]
    before = {phase: phases.get(phase, 0.0) for phase in ("start", "data", "warm_up", "training")}
    outside = max(process_seconds - summary["wall_clock_seconds"], 0.0)
    ending = min(max(ending, 0.0), outside)
    rest = max(summary["wall_clock_seconds"] - sum(before.values()), 0.0)
    return Start(caches, outside - ending, rest=rest + ending, **before)


def earlier(out: Path) -> list[Start]:
    """What an earlier call of the study measured in `out`, which may be new or what one left that was interrupted.

    Raises ValueError where anything else is there, or the measurements are damaged.
    """
    path = out / STARTS
    if path.is_file():
        try:
            return [Start(**start) for start in read_json(path, list)]
        except TypeError as error:
            raise ValueError(f"{path} is damaged ({error}): give a new --out") from error
    there = {part.name for part in out.iterdir()} if out.is_dir() else set()
    foreign = there - {CACHE_FOLDER, "start-0"} or (there and made_with(out / "start-0", "fit") is None)
    if foreign or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out {out} is not empty, and its caches would not be cold: give a new folder")
    return []


@contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Compile caches of the processes that are started inside are in `folder`."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str((folder / name.lower()).resolve()) for name in CACHES})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def table(starts: list[Start]) -> str:
    """Markdown: a row for each run, and the median of the warm ones."""
    rows = ["| caches | to the first counted step | launch | imports, network | data | warm-up | after the last step |"]
    rows.append("|---|---|---|---|---|---|---|")
    for s in starts:
        figures = (s.launch, s.start, s.data, s.warm_up, s.rest)
        rows.append(f"| {s.caches} | **{s.first_step:.1f}** | {' | '.join(f'{x:.1f}' for x in figures)} |")
    warm = [s.first_step for s in starts if s.caches == "warm"]
    if len(warm) > 1:
        rows.append(f"| warm, median | **{statistics.median(warm):.1f}** ({min(warm):.1f}–{max(warm):.1f}) | | | | | |")
    return "\n".join(rows)


def main(args: list[str]) -> None:
    """`hymba study start`."""
    parser = StudyParser(
        "start",
        "Each run trains for a few steps and is scored and exported as the config says. Python's own bytecode and the "
        "system's file cache are as they are. Seconds.",
        of_fit=True,
    )
    parser.add_argument("--config", type=str, default="hymba_32k.yaml", help="Of the runs")
    parser.add_argument("--data_dir", type=str, required=True, help="Shards and tokenizer.model")
    parser.add_argument("--out", type=str, required=True, help="New folder, for the runs and their caches")
    parser.add_argument("--steps", type=int, default=10, help="Counted steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="Runs with warm caches, after the cold one")
    given = parser.read(args)
    out = Path(given.out)
    starts = earlier(out)
    values = {"data.data_dir": given.data_dir, "trainer.max_steps": given.steps, "model.budget_seconds": None}
    arguments = ["--config", given.config, *options(values), *parser.fit_options]
    with caches_in(out / CACHE_FOLDER):
        for repeat in range(given.repeats + 1):
            run = out / f"start-{repeat}"
            if repeat < len(starts):
                summary = run_once("fit", run, "summary.json", arguments)  # read, not run
                continue
            # What an interrupted call left would be gone on with, or be warm.
            for left in [run] if repeat else [run, out / CACHE_FOLDER]:
                shutil.rmtree(left, ignore_errors=True)
            began = time.monotonic()
            summary = run_once("fit", run, "summary.json", arguments)
            seconds, ending = time.monotonic() - began, time.time() - (run / "summary.json").stat().st_mtime
            starts.append(start_of("warm" if repeat else "cold", seconds, summary, ending))
            write_atomic(out / STARTS, json.dumps([asdict(start) for start in starts], indent=1) + "\n")
    starts = starts[: given.repeats + 1]
    text = f"{hardware(summary['environment'])}, {summary['steps']} steps\n\n{table(starts)}\n"
    write_atomic(out / "table.md", text)
    print(text, end="")
