"""Train, export and score a Hymba language model against the clock.

The names below are the public interface; a name's module is imported where the name is first used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba_lightning.data.datamodule import HymbaDataModule
    from hymba_lightning.evaluation.config import TTTConfig
    from hymba_lightning.generation.loading import load_network
    from hymba_lightning.generation.sampler import SamplingConfig, generate
    from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
    from hymba_lightning.quantization import QuantizationConfig, load_artifact
    from hymba_lightning.training.module import HymbaModule
    from hymba_lightning.training.optim_config import OptimizerConfig

__version__ = "0.1.0"

# So often a thread of libgomp, on which torch's CPU operators run, looks for work before it sleeps: some 0.1 ms. The
# 300,000 times of its own keep a core from the threads of native loops, and from other programs, for about 15 ms.
# libgomp reads it once, when torch is imported.
SPINS = "2000"
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

__all__ = [
    "Hymba",
    "HymbaConfig",
    "HymbaDataModule",
    "HymbaModule",
    "OptimizerConfig",
    "QuantizationConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "TTTConfig",
    "generate",
    "load_artifact",
    "load_network",
]
HOMES = {
    "data.datamodule": ("HymbaDataModule",),
    "evaluation.config": ("TTTConfig",),
    "generation.loading": ("load_network",),
    "generation.sampler": ("SamplingConfig", "generate"),
    "model": ("Hymba", "HymbaConfig", "RuntimeConfig"),
    "quantization": ("QuantizationConfig", "load_artifact"),
    "training.module": ("HymbaModule",),
    "training.optim_config": ("OptimizerConfig",),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
