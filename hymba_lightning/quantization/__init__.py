"""From a network's weights to the artifact and back.

A name's module is imported where the name is first used: inspecting a file need not wait for torch, and scoring one
needs none of the code that writes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba_lightning.quantization.artifact import Artifact, load_artifact
    from hymba_lightning.quantization.config import QuantizationConfig
    from hymba_lightning.quantization.format import ArtifactError, is_artifact
    from hymba_lightning.quantization.listing import ArtifactReport, inspect_artifact
    from hymba_lightning.quantization.schemes import Calibration, calibrate
    from hymba_lightning.quantization.writing import ArtifactTooLargeError, check_limit, save_artifact

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactReport",
    "ArtifactTooLargeError",
    "Calibration",
    "QuantizationConfig",
    "calibrate",
    "check_limit",
    "inspect_artifact",
    "is_artifact",
    "load_artifact",
    "save_artifact",
]
MODULES = {
    "artifact": ("Artifact", "load_artifact"),
    "config": ("QuantizationConfig",),
    "format": ("ArtifactError", "is_artifact"),
    "listing": ("ArtifactReport", "inspect_artifact"),
    "schemes": ("Calibration", "calibrate"),
    "writing": ("ArtifactTooLargeError", "check_limit", "save_artifact"),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
