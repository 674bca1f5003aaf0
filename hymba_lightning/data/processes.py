"""Helper processes that import nothing from the current directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

START = """
import importlib, importlib.util, sys
module, package, path = {module!r}, {package!r}, {path!r}
sys.path.extend(entry for entry in path if entry not in sys.path)
spec = importlib.util.spec_from_file_location(package[1], package[0] + "/__init__.py",
                                              submodule_search_locations=[package[0]])
sys.modules[package[1]] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[package[1]])
importlib.import_module(module).main(sys.argv[1:])
"""


def isolated_python(module: str, *arguments: str) -> list[str]:
    """The command of a Python that runs `main(arguments)` of one of our modules.

    A file of the folder where the user happens to stand, queue.py for instance, must not take the place of Python's
    own: the process starts isolated, gets this one's search path, without that folder, behind its own, and this
    package from where it is here.
    """
    here = os.path.realpath(os.curdir)
    path = [os.path.abspath(entry) for entry in sys.path if entry and os.path.realpath(entry) != here]
    start = START.format(module=module, package=(str(PACKAGE), PACKAGE.name), path=list(dict.fromkeys(path)))
    return [sys.executable, "-I", "-c", start, *arguments]
