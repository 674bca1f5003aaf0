"""Which backend serves a call: a named one is honoured or refused; `auto` picks in order and logs its pick once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger("hymba_lightning")


class BackendUnavailableError(RuntimeError):
    """An explicitly named backend cannot serve the call; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op."""

    missing: Callable[[str], str | None]
    """Device type -> why this backend cannot run there, with the remedy; None where it can."""

    refuses: Mapping[str, str] = field(default_factory=dict)
    """Feature of a call that this backend does not offer -> the reason and the remedy."""


@dataclass(frozen=True)
class Operation:
    """The backends of one op and the order in which `auto` tries them."""

    backends: Mapping[str, Backend]
    order: Mapping[str, tuple[str, ...]]
    """Device type -> names, best first; the key "other" stands for every device type not listed."""


_operations: dict[str, Operation] = {}
_announced: set[tuple[str, str, str]] = set()


def register(op: str, operation: Operation) -> None:
    """Makes `op` known to `choose`."""
    _operations[op] = operation


def anywhere(device_type: str) -> str | None:
    """`missing` of a backend that runs on every device."""
    return None


def on_device(device_type: str, remedy: str) -> Callable[[str], str | None]:
    """`missing` of a backend that runs on one type of device only."""

    def missing(found: str) -> str | None:
        return None if found == device_type else f"it runs on {device_type} tensors, these are on {found}: {remedy}"

    return missing


@functools.cache
def is_installed(package: str) -> bool:
    """Whether `package` can be found, without importing it; a folder of that name that is no package does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def needs_package(package: str, install: str, device_type: str) -> Callable[[str], str | None]:
    """`missing` of a backend that lives in an optional package and runs on one type of device."""

    def missing(found: str) -> str | None:
        if found != device_type:
            return f"it runs on {device_type} tensors, these are on {found}"
        if not is_installed(package):
            return f"the package {package} is not installed: {install}"
        return None

    return missing


def needs_triton(device_type: str) -> str | None:
    """`missing` of a backend written in Triton: a GPU, or its interpreter on CPU tensors (tests)."""
    if not is_installed("triton"):
        return "the package triton is not installed: pip install triton (torch's CUDA builds bring it along)"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return f"Triton compiles for GPUs, the tensors are on {device_type}; TRITON_INTERPRET=1 runs it on CPUs, slowly"
    return None


def is_one_step(x_BTE: Tensor) -> bool:
    """Whether a recurrence makes one step on a CPU, without gradient: its definition is then its cheapest form."""
    return x_BTE.size(1) == 1 and x_BTE.device.type == "cpu" and not torch.is_grad_enabled()


def _refusal(backend: Backend, features: tuple[str, ...]) -> str | None:
    return next((backend.refuses[feature] for feature in features if feature in backend.refuses), None)


def available_backends(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends of `op` that can run on `device` here, in the order of the table."""
    device_type = torch.device(device).type
    return tuple(name for name, backend in _operations[op].backends.items() if backend.missing(device_type) is None)


# Under torch.compile this runs once, while tracing: the graph holds only the backend that was chosen.
@torch.compiler.assume_constant_result
def choose(op: str, backend: str, device_type: str, features: tuple[str, ...] = ()) -> str:
    """The backend's name for one call.

    `features` names what the call asks for beyond the plain case (an initial state, say). Raises ValueError for an
    unknown name and BackendUnavailableError for a known one that cannot serve this call.
    """
    operation = _operations[op]
    if backend == "auto":
        return _choose_automatically(op, operation, device_type, features)
    if backend not in operation.backends:
        raise ValueError(f"{op} has no backend {backend!r}; choose auto or one of {', '.join(operation.backends)}")
    reason = operation.backends[backend].missing(device_type) or _refusal(operation.backends[backend], features)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return backend


def _choose_automatically(op: str, operation: Operation, device_type: str, features: tuple[str, ...]) -> str:
    missing = []
    for name in operation.order.get(device_type, operation.order["other"]):
        reason = operation.backends[name].missing(device_type)
        if reason is not None:
            missing.append(f"; not {name}: {reason}")
        elif _refusal(operation.backends[name], features) is None:
            key = (op, device_type, name)
            if key not in _announced:
                _announced.add(key)
                logger.info("%s on %s: backend %s%s", op, device_type, name, "".join(missing))
            return name
    raise BackendUnavailableError(f"{op}: no backend serves this call on {device_type}{''.join(missing)}")
