"""The texts of a submission's folder: README, training log, and the run's records without this machine's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hymba_lightning.files import write_atomic
from hymba_lightning.report.reading import read_json, read_yaml
from hymba_lightning.report.runs import STAGES, Run
from hymba_lightning.run.record import FILE as RECORD
from hymba_lightning.text import printable, values_without_folders, without_folders

LIMIT_BYTES = 16_000_000
LOGS = (
    RECORD,
    "summary.json",
    "test_summary.json",
    "history.json",
    "config.yaml",
    "test_config.yaml",
    "fit.log",
    "test.log",
)


def copy_logs(run: Run, folder: Path) -> None:
    """The run's records as others may read them: without the folders of this machine."""
    for file in LOGS:
        source = run.folder / file
        if not source.is_file():
            continue
        text = source.read_text(encoding="utf-8", errors="replace")
        if file.endswith(".json"):
            content = read_json(source, [])
            text = json.dumps(values_without_folders(content, run.folder), indent=1) + "\n" if content else ""
        elif file.endswith(".yaml"):
            content = read_yaml(source, [])
            text = yaml.safe_dump(values_without_folders(content, run.folder), sort_keys=False) if content else ""
        write_atomic(folder / file, text if file.endswith((".json", ".yaml")) else without_folders(text, run.folder))


def train_log(run: Run) -> str:
    """The history as lines of text."""
    lines = [
        f"step:{row['step']} train_loss:{row['loss']:.4f} train_time:{1000 * row['seconds']:.0f}ms "
        f"tok/s:{row['tokens_per_s']:.0f} lr_scale:{row['lr_scale']:.4f}"
        for row in run.train
    ]
    lines += [
        f"step:{row['step']} val_loss:{row['loss']:.4f} val_bpb:{row['bpb']:.4f} "
        f"train_time:{1000 * row['seconds']:.0f}ms"
        for row in run.val
    ]
    lines += [f"final {stage} val_bpb:{bpb:.6f}" for stage, bpb in run.stages.items()]
    return "\n".join(lines) + "\n"


def readme(run: Run, about: dict[str, Any], launch: str) -> str:
    """README.md. `about`: content of submission.json; `launch`: how evaluate.py is started."""
    stages = "\n".join(f"| {STAGES[stage]} | {bpb:.4f} |" for stage, bpb in run.stages.items())
    digests = "\n".join(f"| {name} | `{digest}` |" for name, digest in about["digests"].items())
    summary, environment = run.summary, run.environment
    tested = run.tested
    assert tested is not None
    title, blurb = printable(about["name"]), about["blurb"]
    if about["referee"]:
        status = (
            f"Verified: evaluate.py of this folder scored {about['referee']['val_bpb']:.6f} bits per byte in a "
            "clean environment."
        )
    else:
        status = "**Unverified**: this folder was packaged without scoring it; the score is the run's own word."
    return f"""# {title}

{blurb}

| stage | val_bpb |
|---|---|
{stages}

{status}

{summary.get("parameters") or 0:,} parameters, {summary.get("steps") or 0:,} steps in \
{summary.get("train_seconds") or 0.0:.1f} s on {environment.get("world_size")} × {environment.get("device")}. \
Artifact {about["bytes_total"] - about["bytes_code"]:,} bytes, code {about["bytes_code"]:,} bytes, \
{about["bytes_total"]:,} of {LIMIT_BYTES:,}. \
Evaluation: {tested.seconds or 0.0:.1f} s, mode {tested.mode}, {tested.tokens:,} tokens.

## Score it

    {launch} evaluate.py --data FOLDER_OF_SHARDS --tokenizer TOKENIZER.model

needs torch, numpy, sentencepiece and zstandard (numba besides on a CPU). The tokens are scored once, left to right, in
chunks of {tested.settings["chunk_tokens"]:,}; the network trains on a chunk only after its score is final.
evaluate.py refuses what is not as it was packaged: digests.json has the SHA-256 of every file of code, the settings,
the artifact, the logs and the validation data. It also refuses a score that is not the one that submission.json claims.

| of | SHA-256 |
|---|---|
{digests}

Training: logs/config.yaml with `hymba fit` of hymba_lightning; train.log and logs/ have its history.
"""
