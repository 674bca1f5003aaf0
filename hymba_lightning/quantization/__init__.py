"""From a network's weights to the artifact and back."""

from hymba_lightning.quantization.artifact import (
    Artifact,
    ArtifactReport,
    ArtifactTooLargeError,
    check_limit,
    evaluation_code_bytes,
    inspect_artifact,
    load_artifact,
    save_artifact,
)
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.container import ArtifactError, is_artifact

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactReport",
    "ArtifactTooLargeError",
    "QuantizationConfig",
    "check_limit",
    "evaluation_code_bytes",
    "inspect_artifact",
    "is_artifact",
    "load_artifact",
    "save_artifact",
]
