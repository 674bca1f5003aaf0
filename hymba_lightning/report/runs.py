"""What the folder of a run holds, read for the report. A run that was killed, or is still going, has less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_lightning.checkpoints import CheckpointError, read_checkpoint
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.quantization import ArtifactError, ArtifactReport, inspect_artifact
from hymba_lightning.report.memory import read_probe
from hymba_lightning.report.reading import is_number, read_json, read_yaml, take_numbers, take_rows
from hymba_lightning.report.scores import fitted_data, is_of, tested_score
from hymba_lightning.run.record import FILE as RECORD
from hymba_lightning.run.record import DataIdentity, RecordError, RunRecord, ScoreRecord
from hymba_lightning.text import printable, values_without_folders, without_folders

TRAIN_FIELDS = ("step", "seconds", "tokens", "loss", "lr_scale", "tokens_per_s")
VAL_FIELDS = ("step", "seconds", "tokens", "loss", "bpb")
STAGES = {
    "unigram": "unigram model",
    "raw": "raw weights",
    "ema": "averaged weights",
    "artifact": "artifact",
    "ttt": "after test-time training",
}
SUMMARY_NUMBERS = (
    "steps",
    "train_seconds",
    "budget_seconds",
    "tokens",
    "tokens_per_s",
    "parameters",
    "unigram_bpb",
    "scored_tokens",
    "artifact_bytes",
    "code_bytes",
    "limit_bytes",
)
TEST_NUMBERS = ("ttt_bpb", "tokens", "chunks", "seconds", "scored_tokens_per_s", "update_ms")
CURVE_FIELDS = ("at_least", "bpb", "n_tokens")
# A run's name, which stands in headings and legends.
NAME_LENGTH = 48


@dataclass
class Run:
    """One run, as its folder tells it: only numbers that belong together."""

    name: str
    folder: Path
    record: RunRecord = field(default_factory=RunRecord)
    tested: ScoreRecord | None = None
    """The test of this run's weights on its fit's data."""
    artifact_sha256: str | None = None
    """Of the artifact that the fit exported, by summary.json."""
    summary: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Options of the fit, flat: model.net.window → 512."""
    phases: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of the fit by phase."""
    train: list[dict[str, float]] = field(default_factory=list)
    val: list[dict[str, float]] = field(default_factory=list)
    probe: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """What `hymba probe` measured of its weights."""
    artifact: ArtifactReport | None = None
    artifact_config: dict[str, Any] = field(default_factory=dict)
    """Of the network in the artifact."""
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read, and why."""

    @property
    def stages(self) -> dict[str, float]:
        """Bits per byte by stage, in the order of the pipeline, as far as they are known."""
        if self.record.scores or self.record.trained:
            scores = {stage: score.bpb for stage, score in self.record.stages().items()} or self.summary.get("bpb", {})
            tested = self.tested and self.tested.bpb
        else:
            scores, tested = self.summary.get("bpb", {}), self.test.get("ttt_bpb")
        known = {"unigram": self.summary.get("unigram_bpb"), **scores, "ttt": tested}
        return {stage: known[stage] for stage in STAGES if known.get(stage) is not None}

    @property
    def without_adaptation(self) -> float | None:
        """Bits per byte of the tested weights on the tested text before test-time training, where that was measured."""
        plain = self.record.without_adaptation(self.tested) if self.tested else None
        return None if plain is None else plain.bpb

    @property
    def data(self) -> DataIdentity | None:
        """What the scores were measured on, None where that is unknown."""
        return fitted_data(self.record) or (self.tested.data if self.tested else None)

    @property
    def tokens_scored(self) -> float | None:
        """Tokens of the test, else of the fit's scores."""
        if self.tested is not None:
            return self.tested.tokens
        fitted = next(iter(self.record.stages().values()), None)
        if fitted is not None:
            return fitted.tokens
        return self.test.get("tokens") or self.summary.get("scored_tokens")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the fit, or of the test where there was none."""
        return self.record.environment or self.summary.get("environment") or self.test.get("environment") or {}

    def step_times(self) -> list[tuple[float, float]]:
        """(training seconds, milliseconds a step since the row before) for each row of the history but the first."""
        pairs = zip(self.train, self.train[1:], strict=False)
        return [
            (b["seconds"], 1000 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]))
            for a, b in pairs
            if b["step"] > a["step"]
        ]

    def running_ttt(self) -> list[tuple[float, float]]:
        """(share of the stream's bytes scored, bits per byte so far) after each chunk."""
        points, bits, seen = [], 0.0, 0
        sizes, scores = self.test.get("chunk_bytes", []), self.test.get("chunk_bpb", [])
        if len(sizes) != len(scores) or any(size <= 0 for size in sizes):
            return []
        for bpb, n_bytes in zip(scores, sizes, strict=True):
            bits, seen = bits + bpb * n_bytes, seen + n_bytes
            points.append((seen / max(sum(sizes), 1), bits / seen))
        return points


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads runs; equal folder names get their parents in front. What is damaged or does not belong is a note.

    Raises:
        FileNotFoundError: A folder does not exist or holds nothing of a run.
        ValueError: The same folder twice.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is given twice; name each folder once")
    names = [path.name for path in paths]
    return [
        _load(path, path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}") for path in paths
    ]


def _load(folder: Path, name: str) -> Run:
    run = Run(printable(name, NAME_LENGTH), folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not any(
        path.is_file() for path in (folder / RECORD, folder / "summary.json", folder / "test_summary.json", checkpoint)
    ):
        raise FileNotFoundError(
            f"{folder} holds no run: no {RECORD}, summary.json, test_summary.json or "
            "checkpoints/last.ckpt. Give the --run_dir of `hymba fit` or `hymba test`"
        )
    try:
        record = RunRecord.load(folder)
        _check_numbers(record)
        run.record, recorded = record, (folder / RECORD).is_file()
    except RecordError as error:
        run.notes.append(str(error))
        recorded = False
    _take_summary(run, recorded)
    _take_test(run, recorded)
    for file in ("config.yaml", "test_config.yaml"):
        if not run.config:
            run.config = values_without_folders(flatten(read_yaml(folder / file, run.notes)), folder)
    history = read_json(folder / "history.json", run.notes)
    if not history and checkpoint.is_file():
        history = _history_of_checkpoint(checkpoint, run.notes)
    run.train = take_rows(history.get("train"), TRAIN_FIELDS, "the training history", run.notes)
    run.val = take_rows(history.get("val"), VAL_FIELDS, "the history of validations", run.notes)
    _take_artifact(run)
    weights = {score.weights for score in run.record.scores}
    weights |= {sha for sha in (run.record.artifact and run.record.artifact.sha256, run.artifact_sha256) if sha}
    probe = read_json(folder / "probe.json", run.notes)
    if probe and checkpoint.is_file():
        weights.add(file_sha256(checkpoint))
    run.probe = read_probe(probe, weights, run.notes)
    run.notes = [printable(without_folders(note, folder), 600) for note in run.notes]
    return run


def _check_numbers(record: RunRecord) -> None:
    """Raises RecordError where something in a record that was read is no number."""
    numbers = [value for score in record.scores for value in (score.nats, score.tokens, score.bytes)]
    if record.trained is not None:
        trained = record.trained
        numbers += [trained.steps, trained.tokens, trained.seconds, trained.parameters]
    if record.artifact is not None:
        artifact = record.artifact
        numbers += [artifact.bytes, artifact.code_bytes, artifact.limit_bytes]
    texts = [text for score in record.scores for text in (score.stage, score.weights, score.mode)]
    texts += [record.artifact.file, record.artifact.sha256] if record.artifact else []
    if not all(map(is_number, numbers)) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{RECORD} is damaged (something in it is no number or no text): it is left out")


def _take_summary(run: Run, recorded: bool) -> None:
    """Takes the fit's figures from the record, and the others from summary.json if that is of the same fit."""
    path, record = run.folder / "summary.json", run.record
    content = read_json(path, run.notes)
    bpb = content.get("bpb")
    scores = take_numbers(bpb, list(bpb), "summary.json", run.notes) if isinstance(bpb, dict) else {}
    stages = {stage: score.bpb for stage, score in record.stages().items()}
    if record.trained is not None and content and scores != stages:
        run.notes.append(f"summary.json has other scores than {RECORD}, and is left out")
        content = {}
    run.summary = take_numbers(content, SUMMARY_NUMBERS, "summary.json", run.notes) | {"bpb": scores}
    phases = content.get("phases")
    run.phases = take_numbers(phases, list(phases), "summary.json", run.notes) if isinstance(phases, dict) else {}
    run.artifact_sha256 = content.get("artifact_sha256")
    run.summary["environment"] = content["environment"] if isinstance(content.get("environment"), dict) else {}
    trained, artifact = record.trained, record.artifact
    if trained is not None:
        rate = trained.tokens / trained.seconds if trained.seconds else None
        run.summary |= {
            "steps": trained.steps,
            "train_seconds": trained.seconds,
            "tokens": trained.tokens,
            "tokens_per_s": rate,
            "parameters": trained.parameters,
        }
        for name in ("artifact_bytes", "code_bytes", "limit_bytes"):
            run.summary.pop(name, None)
    if artifact is not None:
        run.summary |= {
            "artifact_bytes": artifact.bytes,
            "code_bytes": artifact.code_bytes,
            "limit_bytes": artifact.limit_bytes,
        }
    if not content and trained is None:
        run.notes.append("no summary.json: the run has not ended, or was killed")
    elif not recorded:
        run.notes.append(
            f"no {RECORD}, as earlier versions wrote none: on which data and weights its scores were "
            "measured is not known"
        )


def _take_test(run: Run, recorded: bool) -> None:
    """The run's own test from the record, and its curves from test_summary.json where that is of the same test."""
    content = read_json(run.folder / "test_summary.json", run.notes)
    if not recorded and content and run.artifact_sha256 not in (None, content.get("weights_sha256")):
        run.notes.append("test_summary.json is of other weights than summary.json's artifact; it is left out")
        content = {}
    if recorded:
        run.tested, note = tested_score(run.record, run.folder)
        if note is not None:
            run.notes.append(note)
        if content and (run.tested is None or not is_of(content, run.tested)):
            if note is None:
                what = (
                    f"of a test that {RECORD} does not hold"
                    if run.tested is None
                    else f"not of the test in {RECORD}: it says {content.get('ttt_bpb')} bits per byte there are "
                    f"{run.tested.bpb:.6f} of"
                )
                run.notes.append(f"test_summary.json is {what}; it is left out")
            content = {}
    run.test = take_numbers(content, TEST_NUMBERS, "test_summary.json", run.notes)
    run.test["environment"] = content["environment"] if isinstance(content.get("environment"), dict) else {}
    run.test["bpb_by_context"] = take_rows(content.get("bpb_by_context"), CURVE_FIELDS, "test_summary.json", run.notes)
    for name in ("chunk_bpb", "chunk_bytes"):
        values = content.get(name)
        run.test[name] = values if isinstance(values, list) and all(is_number(value) for value in values) else []
    running = run.running_ttt()
    if running and run.tested and abs(running[-1][1] - run.tested.bpb) > 1e-6 * run.tested.bpb:
        run.notes.append("the chunks in test_summary.json do not add up to the test's score: left out")
        run.test["chunk_bpb"] = []


def _take_artifact(run: Run) -> None:
    recorded = run.record.artifact
    path = run.folder / ("artifact.hymba" if recorded is None else recorded.file)
    if not path.is_file():
        return
    try:
        artifact, report = inspect_artifact(path)
        if recorded is None or file_sha256(path) == recorded.sha256:
            run.artifact, run.artifact_config = report, artifact.config
        else:
            run.notes.append(f"{path.name} is not the file that the fit exported: what it holds is left out")
    except (ArtifactError, OSError) as error:
        run.notes.append(str(error))


def _history_of_checkpoint(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        callbacks = read_checkpoint(path, mmap=True).get("callbacks")
    except (CheckpointError, OSError) as error:
        notes.append(str(error))
        return {}
    stats = callbacks.get("TrainingStats") if isinstance(callbacks, dict) else None
    stats = stats if isinstance(stats, dict) else {}

    def rows(name: str, fields: Sequence[str]) -> list[Any]:
        given = stats.get(name)
        return (
            [dict(zip(fields, row, strict=False)) if isinstance(row, list | tuple) else row for row in given]
            if isinstance(given, list)
            else []
        )

    return {"train": rows("train", TRAIN_FIELDS), "val": rows("val", VAL_FIELDS)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a.b': 1}; lists and empty dictionaries are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def differences(dictionaries: Sequence[dict[str, Any]], ignored: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Keys whose values are not the same everywhere → the values, None where a key is missing."""
    keys = list(dict.fromkeys(key for values in dictionaries for key in values))
    rows = {key: [values.get(key) for values in dictionaries] for key in keys if key not in ignored}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
