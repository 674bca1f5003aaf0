"""An artifact together with where its bytes are; a submission's evaluation does without."""

from __future__ import annotations

import os
from pathlib import Path

from hymba_lightning.quantization.artifact import Artifact, decode_file
from hymba_lightning.quantization.report import ArtifactReport, build_report


def inspect_artifact(path: str | os.PathLike) -> tuple[Artifact, ArtifactReport]:
    """An artifact and where its bytes are. Raises as `load_artifact` does."""
    artifact, parts = decode_file(path)
    return artifact, build_report(Path(path).stat().st_size, parts)
