"""What a run trained and scored, written down so that only numbers that belong together can be shown together."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_lightning.files import write_atomic
from hymba_lightning.units import bits_per_byte

FILE = "record.json"
VERSION = 1


class RecordError(ValueError):
    """A record that cannot be read."""


@dataclass(frozen=True)
class DataIdentity:
    """Which text a number is of."""

    digest: str
    """SHA-256 over the shards' contents, the tokenizer and what was left out of them."""
    tokenizer: str
    """SHA-256 of the tokenizer file."""


@dataclass(frozen=True)
class ScoreRecord:
    """One score, with everything that it depends on."""

    stage: str
    """raw, ema, artifact: the stages of a fit; validate; ttt: score-first test-time training."""
    nats: float
    tokens: int
    bytes: int
    data: DataIdentity | None
    """None for a loader of one's own, whose text is unknown."""
    weights: str
    """SHA-256 of the artifact file, or of the weights' names and values."""
    mode: str = "cold"
    """What a token sees of the text before it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Everything else that the number depends on: seq_len, compute dtype, test-time training."""
    seconds: float | None = None
    whole: bool = True
    """Whether all of the text was scored that was to be scored, not only some first chunks of it."""

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return bits_per_byte(self.nats, self.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def of_the_same(self, other: ScoreRecord) -> bool:
        """Whether both are of the same text, so that their difference means something."""
        return self.data is not None and self.data == other.data and self.tokens == other.tokens


@dataclass
class Trained:
    """How much was trained: steps, tokens and seconds."""

    steps: int
    tokens: int
    """Tokens trained on, over all ranks."""
    seconds: float
    budget_seconds: float | None
    parameters: int
    data: DataIdentity | None
    ended_by: str
    """budget, max_steps, max_time, epochs, or callback, such as one that stops early."""


@dataclass
class ArtifactRecord:
    """The exported file."""

    file: str
    """Path, relative to the run's folder where it lies inside."""
    sha256: str
    bytes: int
    code_bytes: int
    limit_bytes: int
    settings: dict[str, Any]
    """Quantization and calibration."""


@dataclass
class RunRecord:
    """Typed content of record.json."""

    trained: Trained | None = None
    artifact: ArtifactRecord | None = None
    scores: list[ScoreRecord] = field(default_factory=list)
    finished: bool = False
    """Whether everything after training was done: scores, export, summary."""
    environment: dict[str, Any] = field(default_factory=dict)

    def add(self, score: ScoreRecord) -> None:
        """Takes a score in, in the place of an older one of the same stage, weights, data and settings."""
        same = ("stage", "weights", "data", "tokens", "mode", "settings")
        self.scores = [old for old in self.scores if any(getattr(old, name) != getattr(score, name) for name in same)]
        self.scores.append(score)

    def stages(self) -> dict[str, ScoreRecord]:
        """The fit's scores by stage; the artifact's only where it is the artifact that is recorded."""
        found = {score.stage: score for score in self.scores if score.stage in ("raw", "ema", "artifact")}
        artifact = found.get("artifact")
        if artifact is not None and (self.artifact is None or artifact.weights != self.artifact.sha256):
            del found["artifact"]
        return found

    def without_adaptation(self, tested: ScoreRecord) -> ScoreRecord | None:
        """The score of the same weights on the same text before test-time training, None where there is none."""
        return next(
            (
                score
                for score in reversed(self.scores)
                if score.stage in ("artifact", "raw", "ema", "validate")
                and score.weights == tested.weights
                and score.of_the_same(tested)
            ),
            None,
        )

    def tested(self) -> ScoreRecord | None:
        """The latest test of the recorded artifact; of whatever was tested where there is no artifact."""
        tests = [score for score in self.scores if score.stage == "ttt" and score.whole]
        if self.artifact is not None:
            tests = [score for score in tests if score.weights == self.artifact.sha256]
        return tests[-1] if tests else None

    def save(self, folder: Path) -> None:
        """Writes record.json, whole or not at all."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        write_atomic(folder / FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """The folder's record, an empty one where there is none.

        Raises:
            RecordError: the file is damaged or of a later version.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                raise RecordError(
                    f"{path} was written by another version of hymba_lightning; use that one, or move the file away"
                )
            trained = content["trained"]
            if trained is not None:
                trained = Trained(**{**trained, "data": _data(trained["data"])})
            artifact = content["artifact"]
            return cls(
                trained,
                None if artifact is None else ArtifactRecord(**artifact),
                [_score(score) for score in content["scores"]],
                bool(content["finished"]),
                dict(content["environment"]),
            )
        except RecordError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecordError(f"{path} is damaged ({error}): move it away, or run again") from error


def _data(content: dict[str, Any] | None) -> DataIdentity | None:
    return None if content is None else DataIdentity(**content)


def _score(content: dict[str, Any]) -> ScoreRecord:
    score = ScoreRecord(**{**content, "data": _data(content["data"])})
    numbers = (score.nats, score.tokens, score.bytes)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers) or score.bytes < 1:
        raise ValueError("a score without numbers")
    return score
