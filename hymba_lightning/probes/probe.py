"""`hymba probe`: everything that is measured about a network's memory, as a table, JSON and a picture."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.device import device_of
from hymba_lightning.files import write_atomic
from hymba_lightning.generation.loading import find_tokenizer, load_network, trained_seq_len
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.probes.copying import Copy, copy_gain
from hymba_lightning.probes.decay import QUANTILES, Memory, decay_times
from hymba_lightning.probes.picture import draw
from hymba_lightning.probes.positions import Curve, by_position
from hymba_lightning.probes.recall import Recall, recall
from hymba_lightning.text import printable

log = logging.getLogger("hymba_lightning")

PROBE, PICTURE = "probe.json", "probe.png"


@dataclass
class Probe:
    """What was measured, and on what."""

    file: str
    file_sha256: str
    weights_sha256: str
    data: str
    """Digest of the validation text and its tokenizer."""
    seq_len: int
    sequences: int
    curves: list[Curve]
    copies: list[Copy]
    recalls: list[Recall]
    memory: list[Memory]
    recall_steps: int
    seconds: float
    environment: dict[str, str]
    folder: Path

    def as_json(self) -> str:
        """All of it, without where it lies."""
        values: dict[str, Any] = {key: value for key, value in asdict(self).items() if key != "folder"}
        values["curves"] = [
            {**curve._asdict(), "bins": [point._asdict() for point in curve.bins]} for curve in self.curves
        ]
        for key in ("copies", "recalls", "memory"):
            values[key] = [one._asdict() for one in getattr(self, key)]
        values["memory_quantiles"] = list(QUANTILES)
        return json.dumps(values, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{printable(self.file)}: {self.sequences} sequences of {self.seq_len:,} tokens; ± one standard error",
            "",
            f"{'':28} {'bits/byte':>9} {'worse by, thousandths':>22}",
        ]
        for curve in self.curves:
            worse = f"{1000 * curve.worse:+.1f} ± {1000 * curve.worse_error:.1f}" if curve.worse_error else ""
            lines.append(f"{curve.name:28} {curve.bpb:9.4f} {worse:>22}")
        if self.copies:
            lines += ["", "a repeated passage is cheaper by, nats a token:"]
            lines += [f"  {one.distance:>7,} tokens on  {one.gain:6.3f} ± {one.error:.3f}" for one in self.copies]
        for pairs in dict.fromkeys(one.pairs for one in self.recalls):
            what = "passkey" if pairs == 1 else f"recall, one of {pairs} pairs"
            lines += [
                "",
                f"{what}, after {self.recall_steps} steps of training on it, share right of "
                f"{self.recalls[0].questions} questions:",
            ]
            lines += [
                f"  {one.distance:>7,} tokens on  {one.right:6.1%} ± {one.error:.1%}"
                for one in self.recalls
                if one.pairs == pairs
            ]
        if self.memory:
            names = ", ".join(f"{quantile:.0%}" for quantile in QUANTILES)
            lines += ["", f"tokens until a state falls to 1/e, by layer: {names} of its channels, longest:"]
            lines += [
                f"  layer {one.layer}: {', '.join(f'{tokens:,.1f}' for tokens in one.tokens)}, {one.longest:,.0f}"
                for one in self.memory
            ]
        lines += ["", f"{self.folder / PROBE}, {self.folder / PICTURE} ({self.seconds:.0f} s)"]
        return "\n".join(lines)


def probe(
    file: str,
    data_dir: str,
    out: str | None = None,
    tokenizer: str | None = None,
    val_files: str = "*_val_*.bin",
    seq_len: int | None = None,
    sequences: int = 8,
    passages: int = 8,
    recall_steps: int | None = None,
    questions: int | None = None,
    device: str = "auto",
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008 - frozen
    seed: int = 0,
) -> Probe:
    """Measures what a network's context is worth, and writes probe.json and probe.png.

    Args:
        file: Artifact, or checkpoint of `hymba fit`.
        data_dir: Folder of token shards; the validation tokens are read.
        out: Folder to write (default: where the file lies, or the run's folder for its checkpoints).
        tokenizer: SentencePiece model (default: tokenizer.model in data_dir).
        val_files: Pattern of the validation shards.
        seq_len: Tokens of a sequence, and the farthest that anything is looked for (default: the run's data.seq_len by
            the config.yaml beside the file, or 32,768).
        sequences: Most sequences for the loss by position; fewer where the text is shorter.
        passages: Repeated passages at each distance; 0 leaves copying out.
        recall_steps: Steps of training before recall is asked for; 0 leaves it out (default: 60, on a CPU 20).
        questions: Asked for recall at each distance (default: 64, on a CPU 32).
        device: cpu, cuda, or auto.
        runtime: How the network is executed.
        seed: Draws the same passages and questions again.

    Raises:
        FileNotFoundError: no file, shards or tokenizer.
        ValueError: a file that is none of ours, another tokenizer, too little text, or a number too small.
    """
    started = time.monotonic()
    # An error of a mean over sequences takes two of them.
    least = {"sequences": (sequences, 2), "passages": (passages, 0), "recall_steps": (recall_steps, 0)}
    least |= {"questions": (questions, 1), "seq_len": (seq_len, 1)}
    for name, (number, minimum) in least.items():
        if number is not None and number < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if passages == 1:
        raise ValueError("passages must be at least 2 for a standard error, or 0 for none, got 1")
    path = Path(file).expanduser()
    where = device_of(device)
    slow = where.type == "cpu"
    recall_steps = (20 if slow else 60) if recall_steps is None else recall_steps
    questions = (32 if slow else 64) if questions is None else questions
    seq_len = (trained_seq_len(path) or 32768) if seq_len is None else seq_len
    net, fingerprint = load_network(path, runtime, where)
    data = HymbaDataModule(data_dir, tokenizer, val_files=val_files, seq_len=seq_len)
    find_tokenizer(path, str(data.tokenizer), fingerprint)
    data.setup("validate")
    stream = data.val_stream()
    count = min(sequences, (len(stream) - 1) // seq_len)
    if count < 2:
        raise ValueError(
            f"{len(stream):,} validation tokens are less than two sequences of {seq_len:,}: lower seq_len, or prepare "
            "more text"
        )
    tokens = torch.stack([stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
    target_bytes = torch.from_numpy(
        np.stack([data.token_bytes.count(one[:-1].numpy(), one[1:].numpy()) for one in tokens])
    )
    tokens, text = tokens.to(where), stream[0 : min(len(stream), 1 << 21)].to(where)
    log.info("loss by position")
    curves = by_position(net, tokens, target_bytes)
    copies: list[Copy] = []
    if passages:
        log.info("copying")
        copies = copy_gain(net, text, seq_len, passages=passages, seed=seed)
    recalls: list[Recall] = []
    for pairs in (1, 4) if recall_steps else ():
        log.info("passkey" if pairs == 1 else "associative recall")
        recalls += recall(net, text, seq_len, pairs=pairs, steps=recall_steps, questions=questions, seed=seed)
    folder = Path(out).expanduser() if out else path.parent.parent if path.parent.name == "checkpoints" else path.parent
    found = Probe(
        file=path.name,
        file_sha256=file_sha256(path),
        weights_sha256=weights_sha256(net.state_dict()),
        data=data.data_digest("val"),
        seq_len=seq_len,
        sequences=count,
        curves=curves,
        copies=copies,
        recalls=recalls,
        memory=decay_times(net, tokens[0, :-1]),
        recall_steps=recall_steps,
        seconds=time.monotonic() - started,
        environment={
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine(),
        },
        folder=folder,
    )
    write_atomic(folder / PROBE, found.as_json())
    draw(found.curves, found.copies, found.recalls, found.memory, math.log2(seq_len), folder / PICTURE)
    return found
