"""The branch beside attention, by name: each file here is one, named like it, its class `Mixer`. No torch here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba_lightning.model.hymba import Hymba
    from hymba_lightning.model.mixer import HybridMixer

MIXERS: dict[str, str] = {found.name: f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)}
"""Name → module."""


def mixer_class(name: str) -> type[HybridMixer]:
    """The class of a mixer in MIXERS."""
    return importlib.import_module(MIXERS[name]).Mixer


def network_class(name: str) -> type[Hymba] | None:
    """The network that a mixer in MIXERS brings along; None for ours."""
    return getattr(importlib.import_module(MIXERS[name]), "Network", None)
