"""The table of backends: an op's folder has one file `backend_<name>.py` for each, whose `BACKEND` says all there is.

A named backend is honoured or refused; `auto` picks the best one there is and logs its pick once. Help and tables are
made from the same entries, so that another backend is another file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hymba_lightning")

# Files of an op's folder that are entries of its table.
PREFIX = "backend_"


class BackendUnavailableError(RuntimeError):
    """An explicitly named backend cannot serve the call; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op."""

    summary: str
    """What it is, for help: a few words."""
    load: Callable[[], Callable[..., Any]]
    """Imports the implementation, which takes the op's operands in the order that its definition has."""
    devices: tuple[str, ...] = ()
    """Types of device that it runs on; none for all."""
    elsewhere: str = ""
    """What to use on other devices."""
    package: str = ""
    """Optional package that it needs, as it is imported."""
    install: str = ""
    """The command that installs it."""
    check: Callable[[str], str | None] | None = None
    """Device type -> why it cannot run there, None where it can; instead of the look at devices and package."""
    refuses: tuple[tuple[Callable[[Any], bool], str], ...] = ()
    """What it cannot serve: whether a call, by what the op says of it, is of this kind; the reason, with the remedy."""
    plain: bool = False
    """Torch's own operators alone, which torch.func's transforms go through; under one, 'auto' takes no other."""
    auto: Mapping[str, int] = field(default_factory=dict)
    """Device type, or "any", -> place in the order in which 'auto' tries, highest first; without one it never does."""

    def missing(self, device_type: str) -> str | None:
        """Why it cannot run on a type of device here, with the remedy; None where it can."""
        if self.check is not None:
            return self.check(device_type)
        if self.devices and device_type not in self.devices:
            remedy = f": {self.elsewhere}" if self.elsewhere else ""
            return f"it runs on {' and '.join(self.devices)} tensors, these are on {device_type}{remedy}"
        if self.package and not is_installed(self.package):
            return f"the package {self.package} is not installed: {self.install}"
        if self.package == "numba" and NUMBA_IS_OFF:
            return "NUMBA_DISABLE_JIT keeps numba from compiling: unset it"
        return None

    def refusal(self, call: Mapping[str, Any]) -> str | None:
        """Why it cannot serve this call, with the remedy; None where it can."""
        asked = SimpleNamespace(**call)
        return next((reason for refused, reason in self.refuses if refused(asked)), None) if call else None

    def place(self, device_type: str) -> int | None:
        """In the order of 'auto'; None if it has none on this type of device."""
        return self.auto.get(device_type, self.auto.get("any"))


# An op -> its table: the backends by name.
OPERATIONS: dict[str, dict[str, Backend]] = {}
_announced: set[tuple[str, str, str]] = set()


def native_loops(
    load: Callable[[], Callable[..., Any]], refuses: tuple[tuple[Callable[[Any], bool], str], ...] = ()
) -> Backend:
    """The entry of an op's native CPU loops, compiled by numba; arguments as `Backend`'s."""
    return Backend(
        "native CPU loops",
        load,
        devices=("cpu",),
        package="numba",
        install="pip install numba",
        refuses=refuses,
        auto={"cpu": 20},
    )


def register(op: str, backends: Mapping[str, Backend]) -> None:
    """Makes `op` known to `choose`."""
    OPERATIONS[op] = dict(backends)


def register_folder(op: str, package: str, definition: Callable[..., Any] | None = None) -> None:
    """Registers `op` with the backends of its folder, the slow `definition` in front as 'naive'.

    Only the entries are imported, not what they load.
    """
    backends = {}
    if definition is not None:
        backends["naive"] = Backend("its definition, slow", lambda: definition, plain=True, auto={"any": 0})
    folder = importlib.import_module(package).__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(folder)):
        if name.startswith(PREFIX):
            backends[name.removeprefix(PREFIX)] = importlib.import_module(f"{package}.{name}").BACKEND
    register(op, backends)


def register_all() -> None:
    """Registers every op of this package, for what speaks of all."""
    ops = importlib.import_module("hymba_lightning.ops")
    for module in pkgutil.iter_modules(ops.__path__):
        if module.ispkg:
            importlib.import_module(f"{ops.__name__}.{module.name}")


# Numba itself looks once, too.
NUMBA_IS_OFF = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


@functools.cache
def is_installed(package: str) -> bool:
    """Whether `package` can be found, without importing it; a folder of that name that is no package does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


INSTALL_TRITON = "pip install triton (torch's CUDA builds bring it along)"


def needs_triton(device_type: str) -> str | None:
    """`check` of a backend written in Triton: a GPU, or its interpreter on CPU tensors (tests)."""
    if not is_installed("triton"):
        return f"the package triton is not installed: {INSTALL_TRITON}"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return f"Triton compiles for GPUs, the tensors are on {device_type}; TRITON_INTERPRET=1 runs it on CPUs, slowly"
    return None


def triton_backend(load: Callable[[], Callable[..., Any]], **entry: Any) -> Backend:
    """The entry of a backend written in Triton."""
    defaults: dict[str, Any] = {
        "summary": "Triton",
        "devices": ("cuda",),
        "package": "triton",
        "install": INSTALL_TRITON,
        "check": needs_triton,
        "auto": {"cuda": 30},
    }
    return Backend(load=load, **defaults | entry)


def settled(condition: bool) -> bool:
    """A condition on lengths, for `choose`: one that a compiler lets vary is decided, and guarded, here."""
    if condition:  # noqa: SIM103 - `bool` leaves it undecided
        return True
    return False


# While compiling it is known: a transform inside of what is compiled is traced, too.
@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether the call is within torch.func's `grad`, `vmap`, `jvp`, …, which an autograd.Function of ours stops."""
    return torch._C._are_functorch_transforms_active()


def is_one_step(x_BTE: Tensor) -> bool:
    """Whether a recurrence makes one step on a CPU, without gradient: its definition is then its cheapest form."""
    return x_BTE.size(1) == 1 and x_BTE.device.type == "cpu" and not torch.is_grad_enabled()


def available_backends(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends of `op` that can run on `device` here, in the order of the table."""
    device_type = torch.device(device).type
    return tuple(name for name, backend in OPERATIONS[op].items() if backend.missing(device_type) is None)


def check_name(op: str, backend: str) -> None:
    """Raises ValueError where `op` has no such backend, nor is it 'auto'."""
    if backend != "auto" and backend not in OPERATIONS[op]:
        raise ValueError(f"{op} has no backend {backend!r}; choose auto or one of {', '.join(OPERATIONS[op])}")


# Under torch.compile this runs once, while tracing: the graph holds only the backend that was chosen.
@torch.compiler.assume_constant_result
def choose(op: str, backend: str, device_type: str, **call: Any) -> str:
    """The backend's name for one call.

    `call` is all that an op says of it, for `Backend.refuses`; nothing stands for a call that nobody refuses. Raises
    ValueError for an unknown name and BackendUnavailableError for a known one that cannot serve this call.
    """
    backends = OPERATIONS[op]
    if backend == "auto":
        return _choose_automatically(op, backends, device_type, call)
    check_name(op, backend)
    reason = backends[backend].missing(device_type) or backends[backend].refusal(call)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return backend


def implementation(op: str, backend: str, device_type: str, **call: Any) -> Callable[..., Any]:
    """The function of the backend that `choose` chooses. Raises as that does."""
    return OPERATIONS[op][choose(op, backend, device_type, **call)].load()


def _choose_automatically(op: str, backends: Mapping[str, Backend], device_type: str, call: Mapping[str, Any]) -> str:
    missing = []
    ordered = [(place, name) for name, entry in backends.items() if (place := entry.place(device_type)) is not None]
    if is_transformed():
        # Slow definitions last.
        ordered = [(name != "naive", name) for name, entry in backends.items() if entry.plain]
    for _, name in sorted(ordered, key=lambda item: -item[0]):
        reason = backends[name].missing(device_type)
        if reason is not None:
            missing.append(f"; not {name}: {reason}")
        elif backends[name].refusal(call) is None:
            key = (op, device_type, name)
            if key not in _announced:
                _announced.add(key)
                logger.info("%s on %s: backend %s%s", op, device_type, name, "".join(missing))
            return name
    raise BackendUnavailableError(f"{op}: no backend serves this call on {device_type}{''.join(missing)}")


def in_words(op: str) -> str:
    """The choices of an op for a line of help."""
    return "auto, " + ", ".join(f"{name} ({backend.summary})" for name, backend in OPERATIONS[op].items())


HEAD = "| backend | what it is | runs on | needs | does not take |"


def as_markdown() -> str:
    """Every op's table for documentation."""
    lines = []
    for op, backends in sorted(OPERATIONS.items()):
        lines += [
            f"### {op}",
            "",
            HEAD,
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| `{name}` | {entry.summary} | {', '.join(entry.devices) or 'any device'} | {entry.install or '–'} "
            f"| {'; '.join(reason for _, reason in entry.refuses) or '–'} |"
            for name, entry in backends.items()
        ]
        lines.append("")
    return "\n".join(lines)
