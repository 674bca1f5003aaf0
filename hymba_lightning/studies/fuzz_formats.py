"""The formats that `fuzz` tries: artifacts, checkpoints, prepared data; and all of `fuzz_inputs`."""

from __future__ import annotations

import base64
import importlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hymba_lightning.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.manifest import MANIFEST_FILE, first_damage, read_manifest, sealed
from hymba_lightning.data.prepare import PrepareSummary, prepare
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.shards import HEADER_BYTES, TOKEN_DTYPE, Shard
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, format, frames, load_artifact, save_artifact
from hymba_lightning.studies import fuzz_inputs
from hymba_lightning.studies.fuzz import Format, NotTriedError, Reading, damage, edit

NET = HymbaConfig(
    vocab_size=60, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_state=4, bigram_buckets=8, bigram_dim=8
)


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

    def read(path: Path, content: bytes) -> Reading:
        got = read_checkpoint(path)
        weights = all(torch.equal(got["state_dict"][name], tensor) for name, tensor in true["state_dict"].items())
        others = all(got[key] == true[key] for key in true if key != "state_dict")
        return Reading.RIGHT if weights and others else Reading.WRONG

    return Format("checkpoint, damaged", make, damage, read, (CheckpointError,))


def shard() -> Format:
    """A shard beside its manifest: anything but the true tokens is wrong."""
    true: list[bytes] = []

    def make(path: Path) -> bytes:
        _prepare(path.parent)
        true.append(path.read_bytes())
        return true[0]

    def read(path: Path, content: bytes) -> Reading:
        HymbaDataModule(str(path.parent), seq_len=16).setup("fit")
        tokens = Shard(path).read(0, Shard(path).n_tokens)
        right = np.array_equal(tokens, np.frombuffer(true[0][HEADER_BYTES:], TOKEN_DTYPE))
        return Reading.RIGHT if right else Reading.WRONG

    return Format("shard with its manifest, damaged", make, damage, read, (ValueError,), "text_train_000000.bin")


def shard_alone() -> Format:
    """A shard without a manifest: its tokens are what its bytes say, as many as its header says."""
    true = np.arange(2000) % 300

    def make(path: Path) -> bytes:
        write_shard(path, true)
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        opened = Shard(path, 300)
        tokens = opened.read(0, opened.n_tokens)
        if np.array_equal(tokens, true):
            return Reading.RIGHT
        says = np.frombuffer(content[HEADER_BYTES:], TOKEN_DTYPE)
        return Reading.OTHER if np.array_equal(tokens, says) and says.max() < 300 else Reading.WRONG

    return Format("shard alone, damaged", make, damage, read, (ValueError,), "alone.bin")


def manifest() -> Format:
    """A manifest, damaged: whatever it is still read for must be what was written."""
    return _manifest("manifest, damaged", damage, Reading.WRONG)


def forged_manifest() -> Format:
    """A manifest with a part changed and its digest repaired: what it says of the files must hold."""

    def forge(content: bytes, rng: random.Random) -> bytes:
        changed = edit(json.loads(content), rng)
        if isinstance(changed, dict):
            changed.pop("sha256", None)
            changed = sealed(changed)
        return json.dumps(changed).encode()

    return _manifest("manifest, forged, digest repaired", forge, Reading.OTHER)


def tokenizer() -> Format:
    """A SentencePiece model, damaged. It has no checksum; data, checkpoints and artifacts name its SHA-256."""
    true: list[list[int]] = []

    def ids(path: Path) -> list[int]:
        encoder = TextEncoder(load_tokenizer(path))
        encoder.audit(fuzz_inputs.TEXTS[0])
        return [token for text in fuzz_inputs.TEXTS for token in encoder.encode(text).tolist()]

    def make(path: Path) -> bytes:
        path.write_bytes(train_tokenizer(fuzz_inputs.TEXTS, 300))
        true.append(ids(path))
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        return Reading.RIGHT if ids(path) == true[0] else Reading.OTHER

    return Format("tokenizer, damaged", make, damage, read, (ValueError,), "t.model")


def tokenizer_json() -> Format:
    """A tokenizer.json, damaged or edited: one that is taken gives every text back, and counts its bytes exactly."""
    library = _library("tokenizers")

    def make(path: Path) -> None:
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>"],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(fuzz_inputs.TEXTS, trainer)
        made.save(str(path))

    def mutate(content: bytes, rng: random.Random) -> bytes:
        return damage(content, rng) if rng.random() < 0.5 else json.dumps(edit(json.loads(content), rng)).encode()

    return _byte_tokenizer("tokenizer.json, damaged or edited", make, mutate, "t.json")


def tokenizer_tiktoken() -> Format:
    """A file of tiktoken's, damaged: one that is taken gives every text back, and counts its bytes exactly."""
    _library("tiktoken")

    def make(path: Path) -> None:
        pieces = [bytes([byte]) for byte in range(256)] + [b" t", b"th", b" th", b"  "]
        path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)))

    return _byte_tokenizer("tiktoken's file, damaged", make, damage, "t.tiktoken")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotTriedError(f'{name} is not installed: pip install "hymba-lightning[tokenizers]"') from error


def _byte_tokenizer(
    name: str, write: Callable[[Path], None], mutate: Callable[[bytes, random.Random], bytes], file: str
) -> Format:
    true: list[list[int]] = []

    def make(path: Path) -> bytes:
        write(path)
        true.extend(load_tokenizer(path).encode(fuzz_inputs.TEXTS))
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        encoder = TextEncoder(load_tokenizer(path))
        ids = [encoder.encode(text).tolist() for text in fuzz_inputs.TEXTS]
        decoded = [encoder.processor.decode(row) for row in ids]
        if decoded != fuzz_inputs.TEXTS or not all(encoder.audit(text).exact for text in fuzz_inputs.TEXTS):
            return Reading.WRONG
        return Reading.RIGHT if ids == true else Reading.OTHER

    return Format(name, make, mutate, read, (ValueError,), file)


FORMATS: dict[str, Callable[[], Format]] = {
    "artifact": damaged_artifact,
    "forged-artifact": forged_artifact,
    "checkpoint": checkpoint,
    "shard": shard,
    "shard-alone": shard_alone,
    "manifest": manifest,
    "forged-manifest": forged_manifest,
    "tokenizer": tokenizer,
    "tokenizer-json": tokenizer_json,
    "tokenizer-tiktoken": tokenizer_tiktoken,
    "text": fuzz_inputs.text,
    "jsonl": fuzz_inputs.jsonl,
    "csv": fuzz_inputs.csv_rows,
    "gz": fuzz_inputs.gzipped,
    "zst": fuzz_inputs.zstd,
    "zst-unchecked": fuzz_inputs.zstd_unchecked,
    "parquet": fuzz_inputs.parquet,
    "parquet-unchecked": fuzz_inputs.parquet_unchecked,
}


# Artifacts ------------------------------------------------------------------------------------------------------------


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
        return format.seal(frames.frame(text, 1), payload)
    else:
        raw_bytes = sum(
            size * header["streams"][name] for name, size in {"q": 1, "scale": 2, "float16": 2, "float32": 4}.items()
        )
        raw = frames.decompress(payload, raw_bytes, "payload")
        payload = frames.frame(damage(raw, rng) or b"\0", 1) if rng.random() < 0.7 else damage(payload, rng)
    text = json.dumps(header).encode()
    return format.seal(frames.frame(text, 1), payload)


def _reads_weights_of(exactly: bool) -> Callable[[Path, bytes], Reading]:
    expected: dict[str, torch.Tensor] = {}

    def read(path: Path, content: bytes) -> Reading:
        artifact = load_artifact(path)
        if not expected:
            expected.update(artifact.state_dict)
        if exactly:
            right = all(torch.equal(artifact.state_dict[name], tensor) for name, tensor in expected.items())
        else:
            with torch.device("meta"):
                shapes = {
                    name: tensor.shape
                    for name, tensor in Hymba(HymbaConfig.from_dict(artifact.config)).state_dict().items()
                }
            right = {name: tensor.shape for name, tensor in artifact.state_dict.items()} == shapes and all(
                bool(torch.isfinite(tensor).all()) for tensor in artifact.state_dict.values()
            )
        return Reading.RIGHT if right else Reading.WRONG

    return read


# Prepared data --------------------------------------------------------------------------------------------------------


def _prepare(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hymba-fuzz-") as source:
        Path(source, "a.jsonl").write_bytes(fuzz_inputs.LINES)
        prepare([source], str(folder), vocab_size=300, val_fraction=0.3, workers=1, progress=False, overwrite=True)


def _manifest(name: str, mutate: Callable[[bytes, random.Random], bytes], changed: Reading) -> Format:
    true: dict[str, Any] = {}

    def make(path: Path) -> bytes:
        _prepare(path.parent)
        true.update(json.loads(path.read_bytes()))
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        found = read_manifest(path.parent)
        if found is None:
            return Reading.WRONG
        HymbaDataModule(str(path.parent), seq_len=16).setup("fit")
        str(PrepareSummary(path.parent, found, 0.0, up_to_date=True))
        whole = first_damage(path.parent, found) is None
        same = {key: found[key] for key in found if key in true} == {key: true[key] for key in found if key in true}
        return Reading.RIGHT if same and whole else changed

    return Format(name, make, mutate, read, (ValueError, FileNotFoundError), MANIFEST_FILE)
