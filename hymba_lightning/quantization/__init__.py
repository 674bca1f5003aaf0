"""From a network's weights to the artifact and back.

A name's module is imported where the name is first used: inspecting a file need not wait for torch, and scoring one
needs none of the code that writes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba_lightning.quantization.artifact import Artifact, load_artifact
    from hymba_lightning.quantization.config import QuantizationConfig
    from hymba_lightning.quantization.container import ArtifactError, is_artifact
    from hymba_lightning.quantization.inspection import inspect_artifact
    from hymba_lightning.quantization.limit import ArtifactTooLargeError, check_limit, evaluation_code_bytes
    from hymba_lightning.quantization.report import ArtifactReport
    from hymba_lightning.quantization.writing import save_artifact

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
MODULES = {
    "artifact": ("Artifact", "load_artifact"),
    "config": ("QuantizationConfig",),
    "container": ("ArtifactError", "is_artifact"),
    "inspection": ("inspect_artifact",),
    "limit": ("ArtifactTooLargeError", "check_limit", "evaluation_code_bytes"),
    "report": ("ArtifactReport",),
    "writing": ("save_artifact",),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
