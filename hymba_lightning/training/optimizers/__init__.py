"""The optimizers. Each file here is one, chosen by the file's name; it has a class `Optimizer`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba_lightning.training.optim import HymbaOptimizer

OPTIMIZERS: dict[str, str] = {found.name: f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)}
"""Name → module. One of your own may be added before an optimizer is built."""


def optimizer_class(name: str) -> type[HymbaOptimizer]:
    """The class of an optimizer, of which there must be one by that name."""
    return importlib.import_module(OPTIMIZERS[name]).Optimizer
