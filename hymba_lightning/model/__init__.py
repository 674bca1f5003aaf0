"""The network. Plain torch: no Lightning, no torch.distributed."""

from hymba_lightning.model.config import HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import Hymba, HymbaState

__all__ = ["Hymba", "HymbaConfig", "HymbaState", "RuntimeConfig"]
