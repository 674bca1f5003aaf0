"""Our training step beside the reference run's own script, on the same GPU, shards and batch.

The script is not part of this project: the user names the file. It runs unchanged in a process of its own, with the
settings of its published run except for the number of ranks, and prints its mean milliseconds a step, as ours does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hymba_lightning.files import write_atomic
from hymba_lightning.studies.arguments import StudyParser
from hymba_lightning.studies.runs import RunFailedError, read_json, run_once
from hymba_lightning.studies.variants import options

# The published command's settings (SLIDING_WINDOW=512 …), one micro-batch a step, no warmdown, no evaluation between.
SETTINGS = {
    "SLIDING_WINDOW": "512",
    "SWA_GLOBAL_LAYERS": "none",
    "NUM_LAYERS": "7",
    "MLP_MULT": "4",
    "MODEL_DIM": "512",
    "NUM_HEADS": "8",
    "NUM_KV_HEADS": "4",
    "HYMBA_EXPAND": "1",
    "HYMBA_SSM_STATE": "8",
    "GRAD_ACCUM_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMDOWN_ITERS": "0",
    "VAL_LOSS_EVERY": "0",
    "TRAIN_LOG_EVERY": "20",
}
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:\S+ train_time:([\d.]+)ms")
MEMORY_LINE = re.compile(r"peak memory allocated: (\d+) MiB")


@dataclass(frozen=True)
class Pair:
    """One run of each, one after the other: milliseconds a step."""

    reference: float
    ours: float


def steady_step_ms(log: str) -> float:
    """Mean milliseconds a step of a reference log, its first 20 steps (which print, and wait for the GPU) left out.

    Raises:
        ValueError: the log has fewer than two such lines.
    """
    times = {int(step): float(ms) for step, ms in STEP_LINE.findall(log) if int(step) >= 20}
    if len(times) < 2:
        raise ValueError(
            "the reference's log has no two lines 'step:N/M train_loss:… train_time:…ms' from step 20 on; "
            f"it ends with:\n{log[-1500:]}"
        )
    first, last = min(times), max(times)
    return (times[last] - times[first]) / (last - first)


def link_shards(data_dir: Path, folder: Path) -> None:
    """Gives the shards of `data_dir` the names that the reference looks for. Raises FileNotFoundError for none."""
    for split in ("train", "val"):
        shards = sorted(data_dir.glob(f"*_{split}_*.bin"))
        if not shards:
            raise FileNotFoundError(f"{data_dir} has no *_{split}_*.bin: make shards with `hymba prepare`")
        for index, shard in enumerate(shards):
            (folder / f"fineweb_{split}_{index:06d}.bin").symlink_to(shard.resolve())


def run_reference(
    script: Path,
    data_dir: Path,
    tokenizer: Path,
    log: Path,
    *,
    seq_len: int,
    tokens: int,
    steps: int,
    timeout: float = 900.0,
) -> float:
    """Runs the reference's script until it has made `steps` steps; returns milliseconds a step.

    Raises:
        RuntimeError: it ended, or `timeout` seconds passed, before its last step; the message has the log's end.
    """
    with tempfile.TemporaryDirectory() as work:
        link_shards(data_dir, Path(work))
        environment = (
            os.environ
            | SETTINGS
            | {
                "DATA_PATH": work,
                "TOKENIZER_PATH": str(tokenizer.resolve()),
                "TRAIN_SEQ_LEN": str(seq_len),
                "TRAIN_BATCH_TOKENS": str(tokens),
                "VAL_BATCH_SIZE": str(tokens),
                "ITERATIONS": str(steps),
                "PYTHONUNBUFFERED": "1",
            }
        )
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, str(script.resolve())],
                cwd=work,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = time.monotonic()
        try:
            # Its evaluation and export, which follow the last step, are not waited for.
            last = f"step:{steps}/{steps} train_loss"
            while process.poll() is None and last not in log.read_text(encoding="utf-8", errors="replace"):
                if time.monotonic() - started > timeout:
                    break
                time.sleep(1.0)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if f"step:{steps}/{steps} train_loss" not in text:
        raise RunFailedError(f"{script} did not reach step {steps} (exit code {process.returncode}):\n{text[-1500:]}")
    return steady_step_ms(text)


def reference_once(
    script: Path, data_dir: Path, out: Path, repeat: int, *, seq_len: int, tokens: int, steps: int
) -> float:
    """`run_reference`, from an earlier call where reference-<repeat>.json in `out` has it.

    Raises:
        ValueError: that file is of another script, data, size or GPU, or damaged.
    """
    log, kept = out / f"reference-{repeat}.log", out / f"reference-{repeat}.json"
    size = {"seq_len": seq_len, "tokens": tokens, "steps": steps}
    of = {"script": hashlib.sha256(script.read_bytes()).hexdigest(), "data": str(data_dir.resolve()), **size}
    of["device"] = device_name()
    if kept.is_file():
        found = read_json(kept, keys=["of", "ms"])
        if found["of"] != of:
            raise ValueError(f"{kept} is of another script, data, size or GPU: give a new --out, or delete it")
        return float(found["ms"])
    ms = run_reference(script, data_dir, data_dir / "tokenizer.model", log, **size)
    write_atomic(kept, json.dumps({"of": of, "ms": ms}) + "\n")
    return ms


def run_ours(
    data_dir: Path, run_dir: Path, *, config: str, seq_len: int, tokens: int, steps: int, extra: list[str]
) -> float:
    """`hymba fit` for as many steps without a budget; returns training milliseconds a step, warm-up left out."""
    values = {
        "data.data_dir": str(data_dir),
        "data.seq_len": seq_len,
        "data.micro_batch_size": tokens // seq_len,
        "data.val_tokens_limit": seq_len,
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.max_steps": steps,
        "model.budget_seconds": None,
        "export.enabled": False,
        "checkpoint.every_n_seconds": None,
    }
    summary = run_once(
        "fit",
        run_dir,
        "summary.json",
        ["--config", config, *options(values), *extra],
    )
    return 1000 * summary["train_seconds"] / summary["steps"]


def device_name() -> str:
    """The GPU's, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(pairs: list[Pair]) -> str:
    """Markdown: every pair, then medians and the ratio's range."""
    ratios = [pair.ours / pair.reference for pair in pairs]
    rows = ["| run | reference, ms/step | ours, ms/step | ratio |", "|---|---|---|---|"]
    rows += [
        f"| {i + 1} | {pair.reference:.1f} | {pair.ours:.1f} | {ratio:.3f} |"
        for i, (pair, ratio) in enumerate(zip(pairs, ratios, strict=True))
    ]
    rows.append(
        f"| median | {statistics.median(p.reference for p in pairs):.1f} | "
        f"{statistics.median(p.ours for p in pairs):.1f} | **{statistics.median(ratios):.3f}** "
        f"({min(ratios):.3f}–{max(ratios):.3f}) |"
    )
    return "\n".join(rows)


def main(args: list[str]) -> None:
    """`hymba study reference`."""
    parser = StudyParser(
        "reference",
        "Both train on the same GPU, shards, batch, sequence length, optimizer and average, in turn. Needs what that "
        "script needs: mamba-ssm, causal-conv1d, sentencepiece.",
        of_fit=True,
    )
    parser.add_argument("--train_gpt", type=str, required=True, help="The reference's train_gpt.py")
    parser.add_argument("--data_dir", type=str, required=True, help="Shards and tokenizer.model")
    parser.add_argument("--out", type=str, required=True, help="Folder of the logs and runs")
    parser.add_argument("--config", type=str, default="hymba_32k.yaml", help="Of our runs")
    parser.add_argument("--seq_len", type=int, default=32768, help="Tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=65536, help="Tokens of a step on one GPU")
    parser.add_argument("--steps", type=int, default=120, help="Steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each")
    given = parser.read(args)
    out, data = Path(given.out), Path(given.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    size = {"seq_len": given.seq_len, "tokens": given.tokens, "steps": given.steps}
    pairs = []
    for repeat in range(given.repeats):
        log = out / f"reference-{repeat}.log"
        reference = reference_once(Path(given.train_gpt), data, out, repeat, **size)
        ours = run_ours(data, out / f"ours-{repeat}", config=given.config, extra=parser.fit_options, **size)
        pairs.append(Pair(reference, ours))
        memory = MEMORY_LINE.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
        print(
            f"run {repeat + 1}: reference {reference:.1f} ms/step, ours {ours:.1f}"
            + (f"; reference's peak memory {memory[-1]} MiB" if memory else ""),
            flush=True,
        )
    print(
        f"{device_name()}, torch {torch.__version__}, "
        f"{given.steps} steps of {given.tokens:,} tokens, sequences of {given.seq_len:,}"
    )
    print(table(pairs))
