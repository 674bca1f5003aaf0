"""The formats that `fuzz` tries: artifacts, checkpoints, prepared data, and every kind of text that goes in."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
import zstandard

from hymba_lightning.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.documents import DocumentReader
from hymba_lightning.data.inputs import InputFile
from hymba_lightning.data.manifest import MANIFEST_FILE, first_damage, read_manifest, sealed
from hymba_lightning.data.parquet import answer
from hymba_lightning.data.prepare import PrepareSummary, prepare
from hymba_lightning.data.shards import HEADER_BYTES, TOKEN_DTYPE, Shard, write_shard
from hymba_lightning.data.sources import answered_rows
from hymba_lightning.data.streams import SourceError
from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.data.tokenizer import load_tokenizer, train_tokenizer
from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, container, load_artifact, save_artifact
from hymba_lightning.studies.fuzz import Format, NotTriedError, Reading, damage, edit

NET = HymbaConfig(
    vocab_size=60, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_state=4, bigram_buckets=8, bigram_dim=8
)
TEXTS = [f"document {number}: " + " ".join(f"w{number * k % 97}" for k in range(40)) for number in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
LIMIT = 1 << 25


class SkippedError(Exception):
    """Something of an input was left out, as a preparation says it."""


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
        encoder.audit(TEXTS[0])
        return [token for text in TEXTS for token in encoder.encode(text).tolist()]

    def make(path: Path) -> bytes:
        path.write_bytes(train_tokenizer(TEXTS, 300))
        true.append(ids(path))
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        return Reading.RIGHT if ids(path) == true[0] else Reading.OTHER

    return Format("tokenizer, damaged", make, damage, read, (ValueError,), "t.model")


def text() -> Format:
    """A text file: no document, or the text that its bytes are."""

    def says(content: bytes) -> list[str]:
        decoded = content.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").replace("\r", "\n")
        return [decoded] if decoded else []

    whole = "\n".join(TEXTS)
    return Format("text", _writes(whole.encode()), damage, _reads_texts(says, [whole]), (SkippedError,), "a.txt")


def jsonl() -> Format:
    """JSON lines: every line is the text that it says, or skipped."""
    return Format("jsonl", _writes(LINES), damage, _reads_texts(_says_lines), (SkippedError,), "a.jsonl")


def csv_rows() -> Format:
    """A CSV file: without a skip, what Python's reader of the whole file says."""
    rows = io.StringIO()
    csv.writer(rows).writerows([["id", "text"], *([index, f'{text}, "x"'] for index, text in enumerate(TEXTS))])

    def says(content: bytes) -> list[str]:
        lines = io.StringIO(content.removeprefix(b"\xef\xbb\xbf").decode(), newline="")
        header, *rows = [row for row in csv.reader(lines, strict=True) if row]
        texts = [row[header.index("text")].replace("\r\n", "\n") for row in rows]
        return [text for text in texts if text]

    written = [f'{text}, "x"' for text in TEXTS]
    return Format(
        "csv", _writes(rows.getvalue().encode()), damage, _reads_texts(says, written), (SkippedError,), "a.csv"
    )


def gzipped() -> Format:
    """JSON lines in two gzip members, which have checksums: a text that was not written is wrong."""

    def says(content: bytes) -> list[str]:
        return _says_lines(gzip.decompress(content))

    half = len(LINES) // 2
    packed = gzip.compress(LINES[:half], mtime=0) + gzip.compress(LINES[half:], mtime=0)
    return Format("jsonl.gz", _writes(packed), damage, _reads_texts(says, checked=True), (SkippedError,), "a.jsonl.gz")


def zstd() -> Format:
    """JSON lines in two zstd frames with checksums, as the command `zstd` writes them."""
    half, packer = len(LINES) // 2, zstandard.ZstdCompressor(write_checksum=True)
    packed = packer.compress(LINES[:half]) + packer.compress(LINES[half:])
    return Format(
        "jsonl.zst", _writes(packed), damage, _reads_texts(_says_zstd, checked=True), (SkippedError,), "a.jsonl.zst"
    )


def zstd_unchecked() -> Format:
    """JSON lines in a zstd frame without a checksum: what its content says."""

    packed = zstandard.compress(LINES)
    return Format(
        "jsonl.zst without checksum", _writes(packed), damage, _reads_texts(_says_zstd), (SkippedError,), "a.jsonl.zst"
    )


def parquet() -> Format:
    """A Parquet file whose pages have checksums: anything but what was written is wrong."""
    return _parquet("parquet with page checksums", checked=True)


def parquet_unchecked() -> Format:
    """A Parquet file without them, as most writers leave it: valid pages are what they say."""
    return _parquet("parquet without page checksums", checked=False)


FORMATS: dict[str, Callable[[], Format]] = {
    "artifact": damaged_artifact,
    "forged-artifact": forged_artifact,
    "checkpoint": checkpoint,
    "shard": shard,
    "shard-alone": shard_alone,
    "manifest": manifest,
    "forged-manifest": forged_manifest,
    "tokenizer": tokenizer,
    "text": text,
    "jsonl": jsonl,
    "csv": csv_rows,
    "gz": gzipped,
    "zst": zstd,
    "zst-unchecked": zstd_unchecked,
    "parquet": parquet,
    "parquet-unchecked": parquet_unchecked,
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
    header, payload = container.read_sections(io.BytesIO(content), len(content))
    kind = rng.randrange(4)
    if kind == 0:
        header = edit(header, rng)
    elif kind == 1:
        header = header | {"config": edit(header["config"], rng)}
    elif kind == 2:
        text = damage(json.dumps(header).encode(), rng) or b" "
        return container.seal(container.frame(text, 1), payload)
    else:
        raw_bytes = sum(
            size * header["streams"][name] for name, size in {"q": 1, "scale": 2, "float16": 2, "float32": 4}.items()
        )
        raw = container.decompress(payload, raw_bytes, "payload")
        payload = container.frame(damage(raw, rng) or b"\0", 1) if rng.random() < 0.7 else damage(payload, rng)
    text = json.dumps(header).encode()
    return container.seal(container.frame(text, 1), payload)


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
        Path(source, "a.jsonl").write_bytes(LINES)
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


# Text in --------------------------------------------------------------------------------------------------------------


def _writes(content: bytes) -> Callable[[Path], bytes]:
    def make(path: Path) -> bytes:
        path.write_bytes(content)
        return content

    return make


def _says_lines(content: bytes) -> list[str]:
    """Texts of the lines that have one. Raises where a line has none, as a preparation would skip it."""
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    texts = [json.loads(line.decode())["text"] for line in lines]
    if not all(isinstance(text, str) and text.encode() is not None for text in texts):
        raise TypeError("no text")
    return [text for text in texts if text]


def _says_zstd(content: bytes) -> list[str]:
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        return _says_lines(reader.read())


def _reads_texts(
    says: Callable[[bytes], list[str]], written: list[str] = TEXTS, checked: bool = False
) -> Callable[[Path, bytes], Reading]:
    """Reads as a preparation does.

    Args:
        says: The texts of a file, by another reader, which may raise.
        written: Those of the true file.
        checked: The file has checksums, so that no other text may be read. (Whole members may be lost or swapped.)
    """

    def read(path: Path, content: bytes) -> Reading:
        reader = DocumentReader([InputFile(path, path.name)], "text", None)
        texts = [document.text for document in reader]
        skipped = reader.skips.state()
        if checked and not set(texts) <= set(written):
            return Reading.WRONG
        if skipped["count"]:
            raise SkippedError(skipped["first"][0])
        if texts == written:
            return Reading.RIGHT
        try:
            return Reading.OTHER if texts == says(content) else Reading.WRONG
        except (ValueError, LookupError, TypeError, RecursionError, csv.Error, zstandard.ZstdError):
            return Reading.WRONG

    return read


def _parquet(name: str, checked: bool) -> Format:
    try:
        arrow, tables = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise NotTriedError('pyarrow is not installed: pip install "hymba-lightning[data]"') from error

    def make(path: Path) -> bytes:
        tables.write_table(arrow.table({"text": TEXTS}), path, row_group_size=15, write_page_checksum=checked)
        return path.read_bytes()

    def read(path: Path, content: bytes) -> Reading:
        texts, skipped = _parquet_texts(path)
        if checked and not set(texts) <= set(TEXTS):
            return Reading.WRONG
        if skipped:
            raise SkippedError(f"{path.name}: {skipped}")
        if texts == TEXTS:
            return Reading.RIGHT
        return Reading.OTHER if not checked and texts == _whole_column(path, tables) else Reading.WRONG

    return Format(name, make, damage, read, (SkippedError,), "a.parquet")


def _parquet_texts(path: Path) -> tuple[list[str], str]:
    """What `answer` gives of the file, and why not more."""
    texts, skipped = [], ""
    with _forked(partial(answer, str(path), "text", LIMIT)) as (answers, ended):
        try:
            for row in answered_rows(answers, ended):
                if row.text is None:
                    skipped = skipped or row.cause
                elif row.text:
                    texts.append(row.text)
        except SourceError as error:
            skipped = str(error)
    return texts, skipped


def _whole_column(path: Path, tables: ModuleType) -> list[str]:
    """The column as pyarrow reads it at once."""

    def read(answers: IO[bytes]) -> None:
        pickle.dump(tables.read_table(path, columns=["text"], use_threads=False)["text"].to_pylist(), answers)

    with _forked(read) as (answers, _):
        texts = [text.decode() if isinstance(text, bytes) else text for text in pickle.load(answers)]
    return [text for text in texts if text]


@contextlib.contextmanager
def _forked(write: Callable[[IO[bytes]], None]) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """A copy of this process that writes and ends, however: what it writes, and a wait for its status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as answers:
                write(answers)
        finally:
            os._exit(0)
    os.close(writing)
    statuses: list[int] = []

    def ended() -> int:
        if not statuses:
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return statuses[0]

    with os.fdopen(reading, "rb") as answers:
        try:
            yield answers, ended
        finally:
            answers.close()
            ended()
