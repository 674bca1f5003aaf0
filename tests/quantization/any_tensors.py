"""The artifact's format alone, with whatever tensors: loading without the comparison with a network."""

from __future__ import annotations

from pathlib import Path

from hymba_lightning.quantization.artifact import Artifact, decode_file
from hymba_lightning.quantization.listing import ArtifactReport, build_report


def unchecked(header: dict, table: list) -> None:
    """Stands in for the comparison of a file's tensors with its network's."""


def load_any(path: Path) -> Artifact:
    return decode_file(path, unchecked)[0]


def inspect_any(path: Path) -> tuple[Artifact, ArtifactReport]:
    artifact, parts = decode_file(path, unchecked)
    return artifact, build_report(path.stat().st_size, parts)
