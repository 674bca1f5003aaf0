"""The model card of a network: README.md of a folder for the hub, made from what the run's record says and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from hymba_lightning import __version__
from hymba_lightning.model import HymbaConfig
from hymba_lightning.report.runs import STAGES
from hymba_lightning.report.scores import tested_score
from hymba_lightning.run.record import RunRecord, ScoreRecord
from hymba_lightning.text import printable, values_without_folders

USE = """\
```python
import hymba_lightning.hf
from transformers import pipeline
print(pipeline("text-generation", "FOLDER")("Once upon a time")[0]["generated_text"])
```

FOLDER is this folder or the repository's name; `pip install 'hymba-lightning[hf]'` brings what is needed."""


def model_card(name: str, config: HymbaConfig, record: RunRecord, folder: Path) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        name: What the model is called.
        config: Of its network.
        record: Of the run that trained it; an empty one where nothing is known.
        folder: The run's, whose artifact and checkpoint tell which scores are its own.
    """
    name = printable(name)
    scores = record.stages()
    tested = tested_score(record, folder)[0]
    if tested is not None:
        scores["ttt"] = tested
    parts = [
        f"---\n{yaml.safe_dump(_metadata(name, scores), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        "A [Hymba](https://arxiv.org/abs/2411.13676) language model: sliding-window attention and a Mamba selective "
        f"scan in parallel in every block. Trained with hymba_lightning {__version__}.",
        f"## Use\n\n{USE}",
        _training(record),
        _scores(scores),
        _network(config),
    ]
    if record.artifact is not None:
        of = record.artifact
        parts.append(
            f"## Artifact\n\n`artifact.hymba` (where it is in this folder): {of.bytes:,} bytes, SHA-256 `{of.sha256}`. "
            f"With {of.code_bytes:,} bytes of evaluation code that is "
            f"{100 * (of.bytes + of.code_bytes) / of.limit_bytes:.1f} % of its limit of {of.limit_bytes:,}."
        )
    parts.append(
        "## What is not known\n\nThe record names the training text by its digest only. Nothing was filtered or "
        "tuned for safety: the model continues texts of the kind it was trained on."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(name: str, scores: dict[str, ScoreRecord]) -> dict:
    metadata = {
        "library_name": "hymba_lightning",
        "pipeline_tag": "text-generation",
        "tags": ["hymba", "mamba", "sliding-window-attention", "hybrid"],
    }
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": "text", "name": f"SHA-256 {score.data.digest[:16]}" if score.data else "unknown"},
            "metrics": [{"type": "bits_per_byte", "name": STAGES[stage], "value": round(score.bpb, 6)}],
        }
        for stage, score in scores.items()
    ]
    return metadata | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _training(record: RunRecord) -> str:
    of = record.trained
    if of is None:
        return ""
    budget = "" if of.budget_seconds is None else f" of {of.budget_seconds:g}"
    lines = [
        f"{of.parameters:,} parameters; {of.steps:,} steps on {of.tokens:,} tokens in {of.seconds:,.1f}{budget} "
        f"seconds, ended by {printable(of.ended_by)}."
    ]
    if of.data is not None:
        lines.append(f"Data SHA-256 `{of.data.digest}`, tokenizer SHA-256 `{of.data.tokenizer}`.")
    environment = values_without_folders(record.environment, Path("/"))
    if environment:
        said = ", ".join(f"{key} {value}" for key, value in environment.items() if isinstance(value, str | int | float))
        lines.append(f"On: {printable(said)}.")
    return "## Training\n\n" + "\n".join(lines)


def _scores(scores: dict[str, ScoreRecord]) -> str:
    if not scores:
        return ""
    rows = [
        f"| {STAGES[stage]} | {score.bpb:.4f} | {score.loss:.4f} | {score.tokens:,} | {score.bytes:,} | {score.mode} |"
        for stage, score in scores.items()
    ]
    head = "| weights | bits per byte | nats per token | tokens | bytes | a token sees |\n|---|---|---|---|---|---|\n"
    return (
        "## Scores\n\n"
        + head
        + "\n".join(rows)
        + "\n\nAfter test-time training each token was scored before any update that saw it." * ("ttt" in scores)
    )


def _network(config: HymbaConfig) -> str:
    plain = HymbaConfig()
    shown = {"vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "window", "d_state"}
    rows = [
        f"| {field.name} | {getattr(config, field.name)} |"
        for field in dataclasses.fields(config)
        if field.name in shown or getattr(config, field.name) != getattr(plain, field.name)
    ]
    return (
        "## Network\n\n| option | value |\n|---|---|\n" + "\n".join(rows) + "\n\nAll other options have their defaults."
    )
