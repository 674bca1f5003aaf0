"""The artifact: one self-describing file with a network's quantized weights, config and tokenizer fingerprint.

No pickle, nothing in it is executed; a damaged or hostile file ends in an ArtifactError. Every count is compared with
what the network of the file's config and the file's own bytes can hold, before anything is unpacked. Torch is imported
where tensors are made: a damaged file is refused at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import format
from hymba_lightning.quantization.format import (
    ArtifactError,
    Entry,
    content_bytes,
    is_count,
    parse_table,
    split_streams,
)
from hymba_lightning.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from hymba_lightning.model import Hymba

# A network is laid out layer by layer, 2 ms each, before its tensors are compared.
MAX_LAYERS = 256
MAX_MESSAGE = 600
Check = Callable[[dict, list[Entry]], None]


class Artifact(NamedTuple):
    """What an artifact holds."""

    config: dict  # of the network, for HymbaConfig.from_dict
    tokenizer: dict  # as given to save_artifact; its fingerprint tells whether a tokenizer fits
    metadata: dict
    state_dict: dict[str, Tensor]  # float32
    quantization: dict  # the QuantizationConfig it was written with

    def network(self, runtime: RuntimeConfig | None = None) -> Hymba:
        """The network with these weights, on the CPU; without `runtime` executed as `RuntimeConfig` has it."""
        from hymba_lightning.model import Hymba

        net = Hymba(HymbaConfig.from_dict(self.config), runtime or RuntimeConfig())
        net.load_state_dict(self.state_dict)
        return net


def load_artifact(path: str | os.PathLike) -> Artifact:
    """Reads an artifact. Raises FileNotFoundError, or ArtifactError naming the file and what is wrong with it."""
    return decode_file(path)[0]


def check_network(header: dict, table: list[Entry]) -> None:
    """Refuses a file whose tensors are not, by name and shape, exactly those of the network that its config describes.

    The network is laid out without memory. Raises ArtifactError naming the first difference.
    """
    check_header(header, table)
    check_shapes(header["config"], {entry.name: entry.shape for entry in table})


def check_shapes(config: dict, stored: dict[str, list[int]]) -> None:
    """Compares tensors' shapes with those of a config's network, for checkpoints too. Raises ArtifactError."""
    from hymba_lightning.model.hymba import outline

    check_anchors(config, stored)
    try:
        net = outline(HymbaConfig.from_dict(config))
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(f"its config is that of no network ({error})") from error
    expected = {name: list(tensor.shape) or [1] for name, tensor in net.state_dict().items()}
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            raise ArtifactError(
                f"its tensor {name} has the shape {stored.get(name, 'of none')}, where its network's "
                f"has {expected.get(name, 'none')}"
            )


def decode_file(path: str | os.PathLike, check: Check = check_network) -> tuple[Artifact, Parts]:
    """The artifact in a file and its parts; puts the file's path in front of an ArtifactError's message."""
    parts = read_parts(path, check)
    try:
        return decode(parts), parts
    except ArtifactError as error:
        raise naming(path, error) from error


def decode(parts: Parts) -> Artifact:
    """The tensors and dictionaries in a file's parts."""
    from hymba_lightning.quantization.tensors import decode_tensor

    streams = split_streams(parts.content, parts.counts)
    state_dict: dict[str, Tensor] = {}
    for entry in parts.table:
        state_dict[entry.name] = (
            state_dict[entry.alias_of].clone() if entry.storage == "alias" else decode_tensor(entry, streams)
        )
    header = parts.header
    return Artifact(header["config"], header["tokenizer"], header["metadata"], state_dict, header["quantization"])


class Parts(NamedTuple):
    """A file taken apart, or about to be put together."""

    header: dict
    counts: dict[str, int]  # entries of each stream
    table: list[Entry]
    content: bytes  # the payload uncompressed
    payload_bytes: int  # and compressed


def check_anchors(config: dict, shapes: dict[str, list[int]]) -> HymbaConfig:
    """The network's config. Raises ArtifactError for values of other types or ranges than they must have, or tensors of
    another vocabulary, width or number of layers; what is left can be laid out quickly."""
    try:
        network = HymbaConfig.from_dict(config)
    except ValueError as error:
        raise ArtifactError(f"its config is that of no network: {error}") from error
    expected = [network.vocab_size, network.d_model]
    if shapes.get("tok_emb.weight") != expected:
        raise ArtifactError(
            f"its config has a token table of {expected}, and its tensors {shapes.get('tok_emb.weight', 'none')}"
        )
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if network.n_layers > MAX_LAYERS or layers != {str(layer) for layer in range(network.n_layers)}:
        raise ArtifactError(
            f"its config has {network.n_layers} layers, and its tensors are of {len(layers)}; at most "
            f"{MAX_LAYERS} can be read"
        )
    return network


def check_header(header: dict, table: list[Entry]) -> None:
    """Refuses a header whose values have other types or ranges than they must, or whose tensors cannot be those of its
    network. Raises ArtifactError."""
    config = check_anchors(header["config"], {entry.name: entry.shape for entry in table})
    tokenizer, metadata, scheme = header["tokenizer"], header["metadata"], header["quantization"]
    for name, value, fits in (
        ("tokenizer.sha256", tokenizer.get("sha256", ""), lambda value: type(value) is str),
        ("tokenizer.vocab_size", tokenizer.get("vocab_size", config.vocab_size), config.vocab_size.__eq__),
        ("metadata.steps", metadata.get("steps", 0), is_count),
        ("metadata.seq_len", metadata.get("seq_len", 1), lambda value: is_count(value) and value > 0),
        ("metadata.train_seconds", metadata.get("train_seconds", 0), is_amount),
        ("quantization.limit_bytes", scheme.get("limit_bytes", 1), lambda value: is_count(value) and value > 0),
        ("quantization.coarsen", scheme.get("coarsen", 1), is_amount),
    ):
        if fits(value) is not True:
            raise ArtifactError(f"its {name} is {value!r}")


def is_amount(value: Any) -> bool:
    """A finite number that is not negative."""
    return type(value) in (int, float) and 0 <= value <= 1e15 and math.isfinite(value)


def read_parts(path: str | os.PathLike, check: Check = check_header) -> Parts:
    """The parts of the file at `path`. `check`, given header and table, may refuse them before anything is unpacked.

    Raises FileNotFoundError, or ArtifactError naming the file and its fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no artifact at {path}")
    try:
        with path.open("rb") as file:
            return read_verified(file, os.fstat(file.fileno()).st_size, check)
    except ArtifactError as error:
        raise naming(path, error) from error


def read_verified(file: BinaryIO, size: int, check: Check = check_header) -> Parts:
    """The parts of a file of `size` bytes, sizes and checksums verified."""
    header, payload = format.read_sections(file, size)
    for section in ("config", "tokenizer", "metadata", "quantization"):
        if not isinstance(header.get(section), dict):
            raise ArtifactError(f"its header has no section '{section}'")
    counts, table = parse_table(header)
    # Aliases count: a tensor that repeats another one has memory of its own in the network.
    format.check_weights_size(sum(entry.numel for entry in table), len(payload))
    check(header, table)
    content = format.decompress(payload, content_bytes(counts), "payload")
    return Parts(header, counts, table, content, len(payload))


def naming(path: str | os.PathLike, error: ArtifactError) -> ArtifactError:
    """The error with the file's path in front and the remedy behind."""
    return ArtifactError(
        f"{printable(str(path))} cannot be loaded: {printable(str(error), MAX_MESSAGE)}. Copy or export it again"
    )
