"""Imports run one way, and the inner layers stay free of Lightning and of process groups."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hymba_lightning"
# A module may import from its own level and below.
LEVELS = {"__init__": 0, "closure": 0, "files": 0, "text": 0, "terminal": 0, "ops": 0, "checkpoints": 1, "model": 1,
          "data": 2, "quantization": 2, "evaluation": 2, "generation": 2, "interop": 2, "metrics": 2, "plots": 2,
          "report": 3, "callbacks": 3, "package": 4, "training": 4, "studies": 5, "cli": 5, "commands": 5,
          "help_text": 6, "__main__": 6}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Dotted names a file imports, except under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    typing_only = {id(inner) for node in ast.walk(tree)
                   if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def level(dotted: str) -> int:
    """Level of a name inside the package."""
    return LEVELS[dotted.split(".")[1] if dotted.split(".")[1] in LEVELS else "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = LEVELS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    for name in imported(path):
        if name.startswith("hymba_lightning."):
            assert level(name) <= own, f"{path.name} is on level {own} and imports {name}"
        if own <= 1:
            assert not name.startswith(("lightning", "torch.distributed")), f"{path.name} imports {name}"


def test_files_stay_readable_in_one_go():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
