"""Runs `hymba fit` once per variant and seed, pairs the results by seed, and writes a table and a plot.

A run that has a summary.json is not run again, so an interrupted study goes on where it was. A run that wrote an
artifact is also tested, with score-first TTT, where the study says so.
"""

from __future__ import annotations

import json
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from hymba_lightning.errors import is_user_error, sentence
from hymba_lightning.options import read_settings, shipped_configs
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.paired import report, scores_of, write_results
from hymba_lightning.studies.runs import RunFailedError, artifact_of, made_with, other_options, run_once
from hymba_lightning.studies.significance import scipy_stats
from hymba_lightning.studies.variants import EXAMPLE, SHIPPED, Study, arguments_of
from hymba_lightning.studies.worker import Worker

# Options that a compiled graph depends on.
GRAPH_OPTIONS = ("model.net", "model.runtime", "data.seq_len", "data.micro_batch_size")


def run_one(
    study: Study, variant: str, seed: int, folder: Path, extra: list[str], worker: Worker, lock: Path | None = None
) -> None:
    """Trains one variant with one seed, on its turn where the device has a `lock`. Raises RunFailedError with the
    log's end, ValueError where the folder holds the run with other options."""
    run_dir, arguments = folder / f"{variant}-{seed}", arguments_of(study, variant, seed, extra)
    turn = (
        []
        if lock is None
        else [
            "--trainer.callbacks+",
            json.dumps({"class_path": "hymba_lightning.studies.turn.DeviceTurn", "init_args": {"path": str(lock)}}),
        ]
    )
    run_once("fit", run_dir, "summary.json", arguments, beside=turn, worker=worker)
    artifact = artifact_of(run_dir)
    if study.test and artifact is not None:
        weights = ["--ckpt_path", str(artifact)]
        run_once("test", run_dir, "test_summary.json", arguments, beside=weights, worker=worker)
    stages = ", ".join(f"{stage} {bpb:.4f}" for stage, bpb in scores_of(run_dir).items())
    print(f"{variant} seed {seed}: {stages} bpb", flush=True)


def _said(error: Exception, variant: str, seed: int) -> str:
    """What ended a run, in words. A fault of the program costs the other runs nothing, but where it is must be seen."""
    if isinstance(error, RunFailedError):
        return str(error)
    user = is_user_error(error)
    if not user:
        traceback.print_exception(error)
    return f"{variant} seed {seed}: {'' if user else f'{type(error).__name__}: '}{sentence(error)}"


class StudyQueue:
    """What is left to run, asked anew each time: seed by seed, so that pairs are complete early, and among the runs of
    a seed first those of the network that the asking process has compiled.

    `source` is a study, or the file of one, which may change meanwhile: variants added to it are run, in its order,
    those taken out are not, and a version that cannot be read leaves the last one in force.
    """

    def __init__(
        self, source: Study | Path, seeds: list[int], folder: Path, only: list[str] | None, extra: list[str]
    ) -> None:
        self.source, self.seeds, self.folder, self.only, self.extra = source, seeds, folder, only, extra
        self.study = source if isinstance(source, Study) else Study.from_yaml(source)
        self.study.names(only)
        self._taken: set[tuple[str, int]] = set()
        self._lock = Lock()

    def graph(self, name: str) -> str:
        """What a variant's compiled graph depends on."""
        changes = self.study.variants[name]
        return json.dumps(
            [changes.get("config")]
            + [[key, value] for key, value in sorted(changes.items()) if key.startswith(GRAPH_OPTIONS)]
        )

    def take(self, compiled: str | None = None) -> tuple[str, int] | None:
        """Takes the next (variant, seed) that is not done and that no other worker has; None where nothing is left.

        Args:
            compiled: `graph` of the caller's last run. A run with the same one comes first, since it compiles nothing.
        """
        with self._lock:
            if isinstance(self.source, Path):
                try:
                    self.study = Study.from_yaml(self.source)
                    self.study.names(self.only)
                except (OSError, ValueError) as error:
                    print(f"the study as it was before goes on: {error}", flush=True)
            left = [
                (name, seed)
                for seed in self.seeds
                for name in self.study.names(self.only)
                if seed in self.study.variants[name].get("seeds", self.seeds)
            ]
            left = [pair for pair in left if pair not in self._taken and not self._done(pair)]
            same = [pair for pair in left if pair[1] == left[0][1] and self.graph(pair[0]) == compiled]
            pair = next(iter([*same, *left]), None)
            if pair is not None:
                self._taken.add(pair)
            return pair

    def _done(self, pair: tuple[str, int]) -> bool:
        """Whether an earlier call of the study finished this run and its test with the same options."""
        run_dir = self.folder / f"{pair[0]}-{pair[1]}"
        if not (run_dir / "summary.json").is_file():
            return False
        if other_options(made_with(run_dir, "fit"), arguments_of(self.study, *pair, self.extra)):
            return False
        return not (self.study.test and artifact_of(run_dir)) or (run_dir / "test_summary.json").is_file()


def run_study(
    source: Study | Path,
    seeds: list[int],
    folder: Path,
    extra: list[str],
    devices: list[str | None],
    only: list[str] | None = None,
    watch: bool = False,
    per_device: int = 1,
) -> str:
    """Runs everything that has not ended yet, `per_device` processes on each device, which train one after the other.

    Returns the table (Markdown); also written to folder/table.md, with plot.png beside it, and results.json after
    every run. With `watch` it waits for variants to be added to the file until folder/stop exists.

    Raises:
        RunFailedError: a run failed, which costs no other one: table and plot are made of what ended, then each failure
            is told.
        ValueError: the study's file, a seed or a variant is none.
        ImportError: several seeds, whose table tests significance, without SciPy.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {seeds}")
    if len(seeds) > 1:
        scipy_stats()
    queue = StudyQueue(source, seeds, folder, only, extra)
    for note in [] if watch else queue.study.without_seed(seeds, only):
        print(f"not run: {note}", flush=True)
    failures: list[str] = []
    reporting, stopping = Lock(), Event()
    places = [device for device in devices for _ in range(per_device)]
    workers = [Worker({} if device is None else {"CUDA_VISIBLE_DEVICES": device}) for device in places]

    def serve(device: str | None, worker: Worker) -> None:
        lock = folder / f"device-{device}.lock" if per_device > 1 else None
        compiled = None
        while not stopping.is_set() and not (folder / "stop").exists():
            pair = queue.take(compiled)
            if pair is None and not watch:
                break
            if pair is None:
                time.sleep(1)
                continue
            compiled = queue.graph(pair[0])
            try:
                run_one(queue.study, *pair, folder, extra, worker, lock)
            except Exception as error:
                if stopping.is_set():
                    break  # it was told to end, and has saved what it has
                failures.append(_said(error, *pair))
                print(failures[-1], flush=True)
            with reporting:
                write_results(queue.study, folder, extra)
        worker.close()

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            list(pool.map(serve, places, workers))
        except BaseException:
            stopping.set()
            for worker in workers:
                worker.stop()
            raise
    study = queue.study
    ended = any((folder / f"{study.baseline}-{seed}" / "summary.json").is_file() for seed in seeds)
    table = ""
    try:
        table = report(study, folder, seeds, only, extra) if ended else ""
    except FileNotFoundError:
        if not failures:  # which say why
            raise
    if failures:
        head = f"{table}\n{len(failures)} runs failed; the same command tries them again:"
        raise RunFailedError("\n".join([head, *failures]))
    return table


def main(args: list[str]) -> None:
    """`hymba study ablation`."""
    parser = StudyParser(
        "ablation",
        "A YAML file names the variants. What has ended is not run again, and a run that fails costs no other one. "
        "Writes table.md, plot.png and results.json.",
        of_fit=True,
    )
    parser.add_argument(
        "study",
        type=str,
        help="YAML file with config, baseline, variants, common; or a shipped one: "
        + ", ".join(name for name in shipped_configs("studies") if "recipes" not in name),
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the runs, the table and the plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Each variant is run with each")
    parser.add_argument("--only", type=str, nargs="+", help="These variants (and the baseline) only")
    parser.add_argument("--devices", type=str, nargs="+", help="GPU numbers; one run at a time on each (default: all)")
    parser.add_argument(
        "--per_device",
        type=int,
        default=1,
        help="Processes on each device, of which one trains while others import and compile",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="When all is done wait for variants added to the file, until a file named stop is in the folder",
    )
    parser.add_argument("--report", action="store_true", help="Run nothing: table and plot of the runs that ended")
    options = parser.read(args)
    path, _ = read_settings(options.study, "", SHIPPED, EXAMPLE)
    out = Path(options.out)
    if options.report:
        print(report(Study.from_yaml(path), out, options.seeds, options.only, parser.fit_options or None))
        return
    devices = options.devices or [None]
    print(
        run_study(
            path, options.seeds, out, parser.fit_options, devices, options.only, options.watch, options.per_device
        )
    )
