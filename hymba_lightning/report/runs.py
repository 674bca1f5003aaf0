"""What the folder of a run holds, read for the report. A run that was killed, or is still going, has less."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hymba_lightning.checkpoints import read_checkpoint
from hymba_lightning.quantization import ArtifactError, ArtifactReport, inspect_artifact

TRAIN_FIELDS = ("step", "seconds", "tokens", "loss", "lr_scale", "tokens_per_s")
VAL_FIELDS = ("step", "seconds", "tokens", "loss", "bpb")
STAGES = {"unigram": "unigram model", "raw": "raw weights", "ema": "averaged weights", "artifact": "artifact",
          "ttt": "after test-time training"}


@dataclass
class Run:
    """One run, as its folder tells it."""

    name: str
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Options of the fit, flat: model.net.window → 512."""
    train: list[dict[str, float]] = field(default_factory=list)
    val: list[dict[str, float]] = field(default_factory=list)
    artifact: ArtifactReport | None = None
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read, and why."""

    @property
    def stages(self) -> dict[str, float]:
        """Bits per byte by stage, in the order of the pipeline, as far as they are known."""
        known = {"unigram": self.summary.get("unigram_bpb"), **self.summary.get("bpb", {}),
                 "ttt": self.test.get("ttt_bpb")}
        return {stage: known[stage] for stage in STAGES if known.get(stage) is not None}

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the fit, or of the test where there was none."""
        return self.summary.get("environment") or self.test.get("environment") or {}

    def step_times(self) -> list[tuple[float, float]]:
        """(training seconds, milliseconds a step since the row before) for each row of the history but the first."""
        pairs = zip(self.train, self.train[1:], strict=False)
        return [(b["seconds"], 1000 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]))
                for a, b in pairs if b["step"] > a["step"]]

    def running_ttt(self) -> list[tuple[float, float]]:
        """(share of the stream's bytes scored, bits per byte so far) after each chunk."""
        points, bits, seen = [], 0.0, 0
        sizes = self.test.get("chunk_bytes", [])
        for bpb, n_bytes in zip(self.test.get("chunk_bpb", []), sizes, strict=False):
            bits, seen = bits + bpb * n_bytes, seen + n_bytes
            points.append((seen / max(sum(sizes), 1), bits / seen))
        return points


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads runs; equal folder names get their parents in front.

    Raises:
        FileNotFoundError: A folder does not exist or holds nothing of a run.
        ValueError: The same folder twice, or a file of a run is damaged.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is given twice; name each folder once")
    names = [path.name for path in paths]
    return [_load(path, path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}")
            for path in paths]


def _load(folder: Path, name: str) -> Run:
    run = Run(name, folder, _json(folder / "summary.json"), _json(folder / "test_summary.json"))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not (run.summary or run.test or checkpoint.is_file()):
        raise FileNotFoundError(f"{folder} holds no run: no summary.json, test_summary.json or checkpoints/last.ckpt. "
                                "Give the --run_dir of `hymba fit` or `hymba test`")
    for file in ("config.yaml", "test_config.yaml"):
        if not run.config and (folder / file).is_file():
            run.config = flatten(yaml.safe_load((folder / file).read_text(encoding="utf-8")) or {})
    history = _json(folder / "history.json")
    run.train, run.val = history.get("train", []), history.get("val", [])
    if not history and checkpoint.is_file():
        _history_of_checkpoint(run, checkpoint)
    artifact = folder / Path(run.summary.get("artifact", "artifact.hymba")).name
    if artifact.is_file():
        try:
            run.artifact = inspect_artifact(artifact)[1]
        except ArtifactError as error:
            run.notes.append(str(error))
    if not run.summary:
        run.notes.append("no summary.json: the run has not ended, or was killed")
    return run


def _history_of_checkpoint(run: Run, path: Path) -> None:
    stats = read_checkpoint(path, mmap=True)["callbacks"].get("TrainingStats", {})
    run.train = [dict(zip(TRAIN_FIELDS, row, strict=True)) for row in stats.get("train", [])]
    run.val = [dict(zip(VAL_FIELDS, row, strict=True)) for row in stats.get("val", [])]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it or run again") from error


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
