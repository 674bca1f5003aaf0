"""Files damaged and forged in every way, thousands of them: each must be refused clearly or read rightly.

A format is a maker (true content), a mutator (content, random → other content) and a reader (path, content → whether
what was read is right; or one of the `refusals`). Anything else that is raised is wrong, and ends the run.
"""

from __future__ import annotations

import io
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba_lightning.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from hymba_lightning.files import write_atomic
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, format, load_artifact, save_artifact

NET = HymbaConfig(
    vocab_size=60, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_state=4, bigram_buckets=8, bigram_dim=8
)
JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**40,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    "\x1b[2J",
    "alias",
    "int",
    "float16",
    [],
    [0],
    [2**20, 2**20],
    [[]],
    {},
    {"q": 1},
]
HEADER = "| format | tried | refused | right | wrong | slowest (ms) | largest (MB) |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Format:
    """How one kind of file is made, changed and read."""

    name: str
    make: Callable[[Path], bytes]
    """Writes a true file at the path; returns its bytes."""
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, bytes], bool]
    """Reads the file whose bytes are given; whether the outcome is right. True files are read first."""
    refusals: tuple[type[Exception], ...]


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    name: str
    tried: int
    refused: int
    right: int
    wrong: int
    slowest: float
    """Processor's seconds."""
    largest: float
    """MB by which the process grew, as the kernel counts its peak."""

    def row(self) -> str:
        return (
            f"| {self.name} | {self.tried:,} | {self.refused:,} | {self.right:,} | {self.wrong:,} | "
            f"{1000 * self.slowest:.0f} | {self.largest:.0f} |"
        )


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped; bytes lost, repeated, inserted, overwritten, zeroed; halves swapped; cut short; made longer."""
    kind, start = rng.randrange(9), rng.randrange(max(len(content), 1))
    length = rng.choice([1, 1, 2, 8, 64, 512, 4096])
    piece = content[start : start + length]
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[start + length :]
    if kind == 2:
        return content[:start] + piece + content[start:]
    if kind == 3:
        return content[:start] + bytes(len(piece)) + content[start + length :]
    if kind == 4:
        return content[:start] + rng.randbytes(len(piece)) + content[start + length :]
    if kind == 5:
        return content[:start] + rng.randbytes(length) + content[start:]
    if kind == 6:
        return content + rng.randbytes(length)
    if kind == 7:
        return content[start:] + content[:start]
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def edit(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part, at a random depth, replaced, removed or repeated."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        result: Any = value.copy()
        if rng.random() < 0.1:
            del result[key]
        elif isinstance(result, list) and rng.random() < 0.1:
            result.insert(key, value[key])
        else:
            result[key] = edit(value[key], rng)
        return result
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 16, 10**6])
    return rng.choice(JUNK)


def fuzz(form: Format, n: int, seed: int = 0, progress: Callable[[int], None] | None = None) -> Outcome:
    """Mutates a true file `n` times. Raises what a reader raises besides its refusals; counts what it reads wrongly."""
    rng = random.Random(seed)
    refused = right = wrong = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="hymba-fuzz-") as folder:
        path = Path(folder) / "file"
        true = form.make(path)
        if not form.read(path, true):
            raise ValueError(f"the true {form.name} is not read rightly")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for index in range(n):
            content = form.mutate(true, rng)
            path.write_bytes(content)
            started = time.process_time()
            try:
                if form.read(path, content):
                    right += 1
                else:
                    wrong += 1
            except form.refusals:
                refused += 1
            slowest = max(slowest, time.process_time() - started)
            if progress is not None:
                progress(index + 1)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Outcome(form.name, n, refused, right, wrong, slowest, grown / 1024)


def damaged_artifact() -> Format:
    """An artifact whose bytes are damaged: anything but the true weights is wrong."""
    return Format("artifact, damaged", _make_artifact, damage, _reads_weights_of(True), (ArtifactError,))


def forged_artifact() -> Format:
    """An artifact that is changed inside and whose checksums are repaired: a network that fits its config is right."""
    return Format(
        "artifact, forged, checksums repaired",
        _make_artifact,
        _forge_artifact,
        _reads_weights_of(False),
        (ArtifactError,),
    )


def checkpoint() -> Format:
    """A checkpoint of a fit, damaged: anything but the true content is wrong."""
    true: dict[str, Any] = {}

    def make(path: Path) -> bytes:
        torch.manual_seed(0)
        true.update(
            state_dict=dict(Hymba(NET).state_dict()),
            global_step=12,
            hyper_parameters={"net": NET.to_dict()},
            callbacks={"WallClock": {"elapsed": 3.5, "steps": 12, "recent": [0.25] * 12}},
        )
        write_checkpoint(path, true)
        return path.read_bytes()

    def read(path: Path, content: bytes) -> bool:
        got = read_checkpoint(path)
        return all(torch.equal(got["state_dict"][name], tensor) for name, tensor in true["state_dict"].items()) and {
            key: got[key] for key in true if key != "state_dict"
        } == {key: true[key] for key in true if key != "state_dict"}

    return Format("checkpoint, damaged", make, damage, read, (CheckpointError,))


FORMATS: dict[str, Callable[[], Format]] = {
    "artifact": damaged_artifact,
    "forged-artifact": forged_artifact,
    "checkpoint": checkpoint,
}


def run(names: list[str], n: int, seed: int, out: Path | None) -> str:
    """Fuzzes the formats named; the table (Markdown), which is also written to `out`.

    Raises ValueError for a format that is not known, or where something was read wrongly.
    """
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]}: choose from {', '.join(FORMATS)}")
    outcomes = [fuzz(FORMATS[name](), n, seed) for name in names or FORMATS]
    table = "\n".join([HEADER, *(outcome.row() for outcome in outcomes)])
    if out is not None:
        write_atomic(out, table + "\n")
    if any(outcome.wrong for outcome in outcomes):
        raise ValueError(f"something was read wrongly:\n{table}")
    return table


def _make_artifact(path: Path) -> bytes:
    torch.manual_seed(0)
    save_artifact(
        path,
        Hymba(NET).state_dict(),
        config=NET.to_dict(),
        metadata={"steps": 3, "seq_len": 64},
        tokenizer={"sha256": "ab" * 32, "vocab_size": 60},
        scheme=QuantizationConfig(keep_float_numel=500, zstd_level=3),
    )
    return path.read_bytes()


def _forge_artifact(content: bytes, rng: random.Random) -> bytes:
    header, payload = format.read_sections(io.BytesIO(content), len(content))
    kind = rng.randrange(4)
    if kind == 0:
        header = edit(header, rng)
    elif kind == 1:
        header = header | {"config": edit(header["config"], rng)}
    elif kind == 2:
        text = damage(json.dumps(header).encode(), rng) or b" "
        return format.seal(format.frame(text, 1), payload)
    else:
        raw_bytes = sum(
            size * header["streams"][name] for name, size in {"q": 1, "scale": 2, "float16": 2, "float32": 4}.items()
        )
        raw = format.decompress(payload, raw_bytes, "payload")
        payload = format.frame(damage(raw, rng) or b"\0", 1) if rng.random() < 0.7 else damage(payload, rng)
    text = json.dumps(header).encode()
    return format.seal(format.frame(text, 1), payload)


def _reads_weights_of(exactly: bool) -> Callable[[Path, bytes], bool]:
    expected: dict[str, torch.Tensor] = {}

    def read(path: Path, content: bytes) -> bool:
        artifact = load_artifact(path)
        if not expected:
            expected.update(artifact.state_dict)
        if exactly:
            return all(torch.equal(artifact.state_dict[name], tensor) for name, tensor in expected.items())
        with torch.device("meta"):
            shapes = {
                name: tensor.shape
                for name, tensor in Hymba(HymbaConfig.from_dict(artifact.config)).state_dict().items()
            }
        return {name: tensor.shape for name, tensor in artifact.state_dict.items()} == shapes and all(
            bool(torch.isfinite(tensor).all()) for tensor in artifact.state_dict.values()
        )

    return read
