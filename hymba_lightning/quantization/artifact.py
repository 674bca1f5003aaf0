"""The artifact: one self-describing file with a network's quantized weights, config and tokenizer fingerprint.

No pickle, nothing in it is executed; a damaged or hostile file ends in an ArtifactError. container.py has the file's
frame, layout.py the order of the weights.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.quantization.container import ArtifactError
from hymba_lightning.quantization.layout import Entry, split_streams
from hymba_lightning.quantization.parts import Check, Parts, check_anchors, check_header, naming, read_parts
from hymba_lightning.quantization.payload import decode_tensor


class Artifact(NamedTuple):
    """What an artifact holds."""

    config: dict  # of the network, for HymbaConfig.from_dict
    tokenizer: dict  # as given to save_artifact; its fingerprint tells whether a tokenizer fits
    metadata: dict
    state_dict: dict[str, Tensor]  # float32
    quantization: dict  # the QuantizationConfig it was written with


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
    """The comparison of tensors' shapes with a config's network, for checkpoints too. Raises ArtifactError."""
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
    streams = split_streams(parts.content, parts.counts)
    state_dict: dict[str, Tensor] = {}
    for entry in parts.table:
        state_dict[entry.name] = (
            state_dict[entry.alias_of].clone() if entry.storage == "alias" else decode_tensor(entry, streams)
        )
    header = parts.header
    return Artifact(header["config"], header["tokenizer"], header["metadata"], state_dict, header["quantization"])
