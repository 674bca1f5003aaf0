"""What an exception means to the one who ran a command: bad input in one sentence, or a fault of the program.

Nothing is read out of an exception's text. Bad input is what this package raises by a `raise` statement, since that is
how it refuses; what Lightning and jsonargparse refuse when they are handed options; and the system's word on files. A
ValueError out of the depth of torch, or out of an `int(…)` of our own, is a fault and shown with its traceback.
"""

from __future__ import annotations

import dis
import errno
import os
import sys
import traceback
from types import TracebackType

from hymba_lightning.signals import ranks
from hymba_lightning.text import printable

USER_ERROR, FAULT = 2, 1

# A file is missing, in the way, not ours to touch, or its disk is full: nothing that another program could help.
SYSTEM_REFUSALS = frozenset(
    {
        errno.ENOENT,
        errno.EEXIST,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EFBIG,
        errno.EIO,
        errno.EINVAL,
        errno.ENOTEMPTY,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENXIO,
    }
)
FULL_DISK = "free some space there, or write to another disk"
REMEDIES = {
    errno.ENOSPC: FULL_DISK,
    errno.EDQUOT: FULL_DISK,
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or write to another disk",
}
OWN = ("hymba_lightning",)
# Where Lightning checks what it is given; its other parts raise where the program is wrong.
CHECKS = (
    "lightning.pytorch.trainer",
    "lightning.pytorch.cli",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.plugins",
    "lightning.fabric",
    "lightning_utilities",
    "jsonargparse",
)
# What stumbles here stumbles over a file that is damaged or no checkpoint.
READERS = ("torch.serialization", "torch._weights_only_unpickler")
REFUSALS = (ValueError, ImportError, OSError, ArithmeticError)
# Builds the C module that starts Triton's kernels.
LAUNCHER_BUILD = "triton.runtime.build"


# Set on an exception that another process has explained.
TOLD = "hymba_is_told"


class UserError(ValueError):
    """Bad input, wherever it is raised: its text is one sentence that names the thing and the remedy."""


class UsageError(UserError):
    """A command line that cannot be understood."""


def all_is_told(error: BaseException) -> None:
    """Has `report` say nothing of an exception that follows from what was told already."""
    setattr(error, TOLD, True)


def is_user_error(error: BaseException) -> bool:
    """Whether what was given is wrong, not the program."""
    if isinstance(error, UserError):
        return True
    if isinstance(error, OSError) and error.errno in SYSTEM_REFUSALS:
        return True
    if _lacks_compiler(error):
        return True
    if type(error).__name__ in ("MisconfigurationException", "BackendUnavailableError"):
        return True
    if _out_of_memory(error):
        return True
    # What pathlib makes of ELOOP before CPython 3.13.
    if type(error) is RuntimeError and str(error).startswith("Symlink loop from "):
        return True
    module, raised = _origin(error.__traceback__)
    if module in READERS:
        return True
    if not raised:
        return False
    if isinstance(error, REFUSALS) and _inside(module, OWN):
        return True
    return isinstance(error, (*REFUSALS, TypeError, RuntimeError)) and _inside(module, CHECKS)


def sentence(error: BaseException) -> str:
    """The exception's text on one line that steers no terminal, with a remedy where the text has none."""
    return printable(_sentence(error))


def refused(error: OSError) -> str:
    """What the system says, and the remedy where it is not in its words; without the file."""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}; {remedy}" if remedy else str(error.strerror or error)


def _sentence(error: BaseException) -> str:
    if _out_of_memory(error):
        return (
            f"out of memory{_detail(error)}: take fewer data.micro_batch_size, a shorter data.seq_len, "
            "model.runtime.activation_checkpointing true, or a smaller network"
        )
    remedy = _lacks_compiler(error)
    if remedy:
        return f"{remedy}{_detail(getattr(error, 'inner_exception', error))}"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return f"{' and '.join(names)}: {refused(error)}" if names else refused(error)
    module, _ = _origin(error.__traceback__)
    if module in READERS:
        return f"a checkpoint cannot be read, it is damaged or of another kind{_detail(error)}"
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def report(error: BaseException, command: str, debug: bool = False) -> int:
    """Says on stderr what went wrong, and returns the exit code for it.

    Bad input is the same for every process of a node, so that only its first one speaks.
    """
    rank, local_rank = ranks()
    user = is_user_error(error)
    if user and local_rank:
        return USER_ERROR
    where = f"{command} (rank {rank})" if rank or local_rank else command
    told = getattr(error, TOLD, False)
    if debug or not (user or told):
        traceback.print_exception(error, file=sys.stderr)
    if user:
        print(f"{where}: {sentence(error)}", file=sys.stderr)
        return USER_ERROR
    if told:
        return FAULT
    print(
        f"{where}: {type(error).__name__}: {sentence(error)}. This is a fault of the program, not of what it was "
        "given: please report it with the lines above",
        file=sys.stderr,
    )
    return FAULT


def _origin(trace: TracebackType | None) -> tuple[str, bool]:
    """Module of the frame an exception comes from, and whether a `raise` statement stands there."""
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_code
    return trace.tb_frame.f_globals.get("__name__", ""), code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _lacks_compiler(error: BaseException) -> str | None:
    """What is missing of the system's compilers and how to go on, None for any other error."""
    # What torch.compile's own backend wraps in an error of its own.
    inner = getattr(error, "inner_exception", error)
    if type(inner).__name__ == "InvalidCxxCompiler":
        return (
            "torch.compile works through a C++ compiler, and there is none: install g++, name yours in CXX, or set "
            "model.compile to false"
        )
    if type(inner).__name__ == "CppCompileError":
        return (
            "torch.compile works through a C++ compiler, and that of this system failed: install g++ and Python's "
            "headers (python3-dev), name another in CXX, or set model.compile to false"
        )
    trace = inner.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") != LAUNCHER_BUILD:
        trace = trace.tb_next
    if trace is None:
        return None
    return (
        "Triton's kernels are started by a small C module, which could not be built: install gcc and Python's headers "
        "(python3-dev), or name your compiler in CC"
    )


def _out_of_memory(error: BaseException) -> bool:
    # torch has a class of its own for a GPU's memory, and none for the machine's.
    on_cpu = type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _detail(error: BaseException) -> str:
    """The first line of the exception's text in brackets, of a compiler's the one that says what is wrong; '' where it
    has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if "error: " in line), lines[0] if lines else "")
    return f" ({first.rstrip('.')})" if first else ""
