"""Imports that a command waits for, made shorter. Imports nothing heavy itself."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

# What Lightning and this package take from torchmetrics, and where it is; the last is needed before the others.
PARTS = {
    "Metric": "torchmetrics.metric",
    "MetricCollection": "torchmetrics.collections",
    "__version__": "torchmetrics.__about__",
    "utilities": "torchmetrics.utilities",
}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is imported inside stays until the process ends: it is not searched for garbage, now or later. Otherwise a
    fifth of the imports' time, and a twentieth of a compilation's, is such searches."""
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # A second command of a process imports nothing, and what the first has left may be garbage.
        if len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()


def import_torchmetrics_in_parts() -> None:
    """Lets `import torchmetrics` load what Lightning takes from it, and the rest when any other name is asked for.

    The rest imports whatever its metrics of images, sound and text can use and is installed: scipy, torchvision,
    transformers.
    """
    # Asked first: what others put there may have no spec, which find_spec refuses.
    spec = None if "torchmetrics" in sys.modules else importlib.util.find_spec("torchmetrics")
    if spec is None or spec.loader is None:
        return
    loader, package = spec.loader, importlib.util.module_from_spec(spec)
    # Threads that ask meanwhile wait, as at an import; what the rest itself asks for is there or is not.
    lock, started = threading.RLock(), False

    def find(name: str) -> Any:
        nonlocal started
        if name in PARTS:
            with contextlib.suppress(ImportError, AttributeError):
                part = importlib.import_module(PARTS["utilities"])
                setattr(package, name, part if name == "utilities" else _attribute(PARTS[name], name))
                return getattr(package, name)
        # `from torchmetrics import *` asks for __all__, and anybody for other such names that no package has.
        elif name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")
        with lock:
            if not started:
                started = True
                try:
                    loader.exec_module(package)
                except BaseException:
                    started = False
                    raise
        if name in vars(package):
            return vars(package)[name]
        raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")

    package.__getattr__ = find  # type: ignore[attr-defined, method-assign]
    package._logger = logging.getLogger("torchmetrics")  # type: ignore[attr-defined]
    sys.modules["torchmetrics"] = package


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
