"""`hymba export`: writes the artifact of a checkpoint that is there already, under any scheme and limit in bytes.

`hymba fit` does the same at its end, for the network in memory.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_lightning import __version__
from hymba_lightning.checkpoints import check_tokenizer, read_checkpoint
from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.manifest import check_manifest
from hymba_lightning.data.shards import find_shards
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.device import device_of
from hymba_lightning.files import check_place, not_a_file
from hymba_lightning.generation.loading import find_tokenizer, load_network
from hymba_lightning.model import Hymba, RuntimeConfig
from hymba_lightning.quantization import (
    ArtifactReport,
    QuantizationConfig,
    check_limit,
    is_artifact,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.schemes import calibrate

log = logging.getLogger("hymba_lightning")


@dataclass(frozen=True)
class Source:
    """A network to export, and what its file says about it."""

    net: Hymba
    """Ready to run, with float32 weights."""
    metadata: dict[str, Any]
    """What goes into the artifact besides: `steps` (optimizer steps it was trained for) and `seq_len` (tokens of its
    training sequences), where they are known."""
    fingerprint: str | None
    """SHA-256, in hexadecimal, of the tokenizer it was trained with; None where the file does not say."""
    weights: str
    """Which weights these are, for a message: averaged, of the last step, or an artifact's."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote; as text, a line for the terminal."""

    path: Path
    """The artifact."""
    report: ArtifactReport
    """Its bytes, tensor by tensor."""
    code_bytes: int
    """Bytes of the code that scores it, which count against the limit too."""
    limit_bytes: int
    """Most bytes that both may have together."""
    weights: str
    """Which weights were taken, as in `Source`."""
    seconds: float
    """Seconds that calibration, rounding and compression took together."""

    def __str__(self) -> str:
        total = self.report.bytes + self.code_bytes
        widths: dict[str, int] = {}
        for tensor in self.report.tensors:
            if not tensor.storage.startswith("alias"):
                widths[tensor.storage] = widths.get(tensor.storage, 0) + tensor.bytes
        shares = ", ".join(f"{storage} {n_bytes:,}" for storage, n_bytes in sorted(widths.items()))
        return (
            f"{self.path}: {self.weights}, {self.report.bytes:,} bytes ({shares}) + {self.code_bytes:,} of "
            f"evaluation code = {total:,}, {total / self.limit_bytes:.2%} of {self.limit_bytes:,}; "
            f"{self.seconds:.1f} s"
        )


def export(
    ckpt: str,
    out: str,
    quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 - frozen
    data_dir: str | None = None,
    tokenizer: str | None = None,
    train_files: str = "*_train_*.bin",
    calibration_batches: int = 16,
    seq_len: int | None = None,
    device: str = "auto",
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
) -> Exported:
    """Writes an artifact of a checkpoint's weights, the averaged ones where it has them.

    Args:
        ckpt: Checkpoint of `hymba fit`; an artifact too, which is then rounded a second time.
        out: Artifact to write.
        quantization: How the weights are stored, and the limit in bytes.
        data_dir: Folder of the training shards to calibrate on. The challenge counts calibration as training time.
        tokenizer: SentencePiece model (default: the data's, else the one of the run that the checkpoint lies in).
        train_files: Pattern of the training shards.
        calibration_batches: Training sequences to calibrate on.
        seq_len: Their length (default: as in training).
        device: cpu, cuda, or auto: where calibration runs.
        runtime: How the network is executed there.

    Raises:
        FileNotFoundError: no checkpoint, shards or tokenizer.
        ValueError: the file is none of ours, or does not fit the data; a scheme that needs calibration without data.
        ArtifactTooLargeError: what was written is over the limit.
    """
    if quantization.calibrated and data_dir is None:
        raise ValueError("GPTQ needs training batches: give --data_dir, or another scheme")
    if calibration_batches < 1:
        raise ValueError(f"calibration_batches={calibration_batches} must be at least 1")
    check_place(Path(out))
    where = device_of(device)
    source = read_source(Path(ckpt), tokenizer, runtime, where)
    started, fingerprint = time.monotonic(), source.fingerprint
    batches: list[Tensor] = []
    if data_dir is not None:
        data = HymbaDataModule(
            data_dir,
            tokenizer,
            train_files=train_files,
            micro_batch_size=1,
            seq_len=seq_len or source.metadata.get("seq_len") or HymbaDataModule().seq_len,
        )
        fingerprint = check_data(source, data)
        batches = [batch.inputs.to(where) for batch in data.calibration_batches(calibration_batches)]
    calibration = calibrate(source.net, quantization, batches).cpu()
    weights = {name: tensor.detach().cpu() for name, tensor in source.net.state_dict().items()}
    known = {"sha256": fingerprint} if fingerprint else {}
    code_bytes = evaluation_code_bytes(source.net.config.mixer)
    report = save_artifact(
        out,
        weights,
        config=source.net.config.to_dict(),
        tokenizer=known | {"vocab_size": source.net.config.vocab_size},
        metadata=source.metadata | {"hymba_lightning": __version__},
        scheme=quantization,
        code_bytes=code_bytes,
        **calibration._asdict(),
    )
    check_limit(report.bytes, code_bytes, quantization.limit_bytes, report)
    return Exported(Path(out), report, code_bytes, quantization.limit_bytes, source.weights, time.monotonic() - started)


def read_source(path: Path, tokenizer: str | None, runtime: RuntimeConfig, device: torch.device) -> Source:
    """The network in a checkpoint of `hymba fit`, with its averaged weights where it has them, or in an artifact.

    Args:
        path: The file.
        tokenizer: File of the tokenizer, for a checkpoint that does not name its own; None looks beside it.
        runtime: How the network is executed.
        device: Where it is put.

    Raises:
        FileNotFoundError: there is no such file, or `tokenizer` is none.
        ValueError: the file is damaged, or of another kind.
    """
    if not path.is_file():
        raise not_a_file(f"--ckpt {path}", path, "a checkpoint or an artifact")
    net, fingerprint = load_network(path, runtime, device)
    if is_artifact(path):
        log.warning("%s is rounded already: the checkpoint it came from loses less", path)
        return Source(net, load_artifact(path).metadata, fingerprint, "an artifact's weights")
    checkpoint = read_checkpoint(path, mmap=True)
    metadata = {"steps": checkpoint.get("global_step"), "seq_len": checkpoint.get("HymbaDataModule", {}).get("seq_len")}
    if fingerprint is None:
        try:
            fingerprint = file_sha256(find_tokenizer(path, tokenizer, None))
        except FileNotFoundError:
            if tokenizer is not None:
                raise
            log.warning("%s does not tell its tokenizer, and so the artifact cannot: give --tokenizer", path)
    return Source(
        net,
        {key: value for key, value in metadata.items() if value is not None},
        fingerprint,
        "averaged weights" if "averaging_state" in checkpoint else "last-step weights",
    )


def check_data(source: Source, data: HymbaDataModule) -> str:
    """Makes sure that the network was trained with the data's tokenizer, which made the training shards; returns its
    SHA-256 in hexadecimal.

    Raises:
        ValueError: the vocabularies differ in size, or the tokenizers in content; a shard is damaged.
    """
    if data.vocab_size != source.net.config.vocab_size:
        raise ValueError(
            f"{data.tokenizer} has {data.vocab_size} pieces, but the network's vocab_size is "
            f"{source.net.config.vocab_size}: give --data_dir and --tokenizer of its training"
        )
    fingerprint = data.tokenizer_fingerprint()
    if source.fingerprint is not None:
        check_tokenizer("the network", source.fingerprint, fingerprint, data.tokenizer, "--data_dir or --tokenizer")
    check_manifest(data.data_dir, find_shards(data.train_files, data.data_dir), data.tokenizer)
    return fingerprint
