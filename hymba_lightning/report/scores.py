"""Which numbers of a run belong together: those of its own weights, on the data of its fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.run.record import DataIdentity, RunRecord, ScoreRecord


def fitted_data(record: RunRecord) -> DataIdentity | None:
    """The validation data of the fit, None where it scored none or its text is unknown."""
    return next((score.data for score in record.stages().values()), None)


def tested_score(record: RunRecord, folder: Path) -> tuple[ScoreRecord | None, str | None]:
    """The latest test of the run's own weights on its fit's data, and why the latest test of all is not that one.

    The weights are the recorded artifact's; where nothing was exported, those that the fit scored, or the last
    checkpoint's. In a folder that was never fitted in, every test is its own.
    """
    tests = [score for score in record.scores if score.stage == "ttt"]
    if not tests:
        return None, None
    own, data, latest = _own_weights(record, folder), fitted_data(record), tests[-1]
    of_weights = [score for score in tests if own is None or score.weights in own]
    right = [score for score in of_weights if score.whole and (data is None or score.data == data)]
    chosen = right[-1] if right else None
    if chosen is latest:
        return chosen, None
    what = f"the latest test ({latest.bpb:.4f} bits per byte of {latest.tokens:,} tokens)"
    if latest not in of_weights:
        return chosen, f"{what} was of other weights than the run's, and is left out"
    if not latest.whole:
        return chosen, f"{what} was of a part of the validation data, and is left out"
    return chosen, f"{what} was on other data than the fit's validation data, and is left out"


def is_of(test: dict[str, Any], score: ScoreRecord) -> bool:
    """Whether the content of a test_summary.json is that of the score in the record."""
    data = None if score.data is None else score.data.digest
    same = (test.get("weights_sha256"), test.get("data"), test.get("tokens"), test.get("bytes"), test.get("mode")) == (
        score.weights,
        data,
        score.tokens,
        score.bytes,
        score.mode,
    )
    return same and _near(test.get("ttt_bpb"), score.bpb) and _near(test.get("nats"), score.nats)


def _near(value: Any, expected: float) -> bool:
    return isinstance(value, int | float) and abs(value - expected) <= 1e-9 * abs(expected)


def _own_weights(record: RunRecord, folder: Path) -> set[str] | None:
    if record.artifact is not None:
        return {record.artifact.sha256}
    files = [folder / "checkpoints" / "last.ckpt"]
    if record.trained is None:
        if not (folder / "summary.json").is_file():
            return None
        # Fitted before there were records.
        files.append(folder / "artifact.hymba")
    scored = {score.weights for score in record.stages().values()}
    return scored | {file_sha256(path) for path in files if path.is_file()}
