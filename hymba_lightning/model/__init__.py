"""The network. Plain torch: no Lightning, no torch.distributed.

Only the network itself waits for torch; its config is read without.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hymba_lightning.model.config import HymbaConfig, RuntimeConfig

if TYPE_CHECKING:
    from hymba_lightning.model.hymba import Hymba, HymbaState

__all__ = ["Hymba", "HymbaConfig", "HymbaState", "RuntimeConfig"]


def __getattr__(name: str) -> Any:
    if name in ("Hymba", "HymbaState"):
        return getattr(importlib.import_module(f"{__name__}.hymba"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
