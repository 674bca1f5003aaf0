"""Helper processes that import nothing from the current directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def isolated_python(module: str, *arguments: str) -> list[str]:
    """The command of a Python that runs `main(arguments)` of one of our modules.

    A file of the folder where the user happens to stand, queue.py for instance, must not take the place of Python's
    own: the process starts isolated, and gets this one's search path, without that folder, behind its own.
    """
    here = os.path.realpath(os.curdir)
    entries = [os.path.abspath(entry) for entry in sys.path if entry and os.path.realpath(entry) != here]
    path = list(dict.fromkeys([*entries, PACKAGE_PARENT]))
    start = ("import sys, importlib; "
             f"sys.path.extend(entry for entry in {path!r} if entry not in sys.path); "
             f"importlib.import_module({module!r}).main(sys.argv[1:])")
    return [sys.executable, "-I", "-c", start, *arguments]
