"""Imports run one way, and the inner layers stay free of Lightning and of process groups."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hymba_lightning"
# A module may import from its own level and below.
LEVELS = {
    "__init__": 0,
    "claim": 0,
    "closure": 0,
    "cores": 0,
    "device": 0,
    "errors": 0,
    "files": 0,
    "field_types": 0,
    "imports": 0,
    "signals": 0,
    "streams": 0,
    "terminal": 0,
    "text": 0,
    "units": 0,
    "usage": 0,
    "yaml_text": 0,
    "ops": 0,
    "checkpoints": 1,
    "model": 1,
    "data": 2,
    "quantization": 2,
    "evaluation": 2,
    "generation": 2,
    "interop": 2,
    "metrics": 2,
    "muon": 2,
    "plots": 3,
    "probes": 4,
    "trainer_internals": 2,
    "run": 3,
    "hf": 3,
    "report": 4,
    "callbacks": 4,
    "package": 5,
    "training": 5,
    "option_checks": 6,
    "options": 6,
    "plain": 6,
    "training_options": 6,
    "studies": 6,
    "cli": 6,
    "commands": 6,
    "help_text": 7,
    "command_line": 7,
    "__main__": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Dotted names a file imports, those under `if TYPE_CHECKING` included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def level(dotted: str) -> int:
    """Level of a name inside the package."""
    return LEVELS[dotted.split(".")[1] if dotted.split(".")[1] in LEVELS else "__init__"]


# All but the public names, which lie above what holds them; importing the package must load none of that.
LAYERED = [path for path in FILES if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = LEVELS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    for name in imported(path):
        if name.startswith("hymba_lightning."):
            assert level(name) <= own, f"{path.name} is on level {own} and imports {name}"
        if own <= 1:
            assert not name.startswith(("lightning", "torch.distributed")), f"{path.name} imports {name}"


def _says_its_encoding(call: ast.Call) -> bool:
    """False for a call that opens a file as text in whatever encoding the locale has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:
        return True
    if name == "read_text":
        return bool(call.args)
    if name == "write_text":
        return len(call.args) > 1
    if name not in ("open", "fdopen") or (owner in ("os", "gzip", "tarfile", "zipfile", "Image") and name == "open"):
        return True
    position = 0 if isinstance(call.func, ast.Attribute) and name == "open" else 1
    modes = [*call.args[position : position + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    # A mode that depends is seen by what it depends on.
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and "b" in part.value
        for mode in modes
        for part in ast.walk(mode)
    )


@pytest.mark.parametrize(
    ("code", "holds"),
    [
        ("open('x')", False),
        ("open('x', 'w')", False),
        ("open('x', 'rb')", True),
        ("open('x', encoding='utf-8')", True),
        ("path.open()", False),
        ("path.open('wb')", True),
        ("path.read_text()", False),
        ("path.write_text('x')", False),
        ("os.fdopen(handle, 'wb')", True),
        ("os.fdopen(handle, 'w')", False),
        ("os.open('x', os.O_RDWR)", True),
        ("path.read_text(errors='replace')", False),
        ("gzip.open(raw)", True),
    ],
)
def test_what_counts_as_saying_the_encoding(code, holds):
    assert _says_its_encoding(ast.parse(code).body[0].value) is holds


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_files_are_utf_8_whatever_the_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if not _says_its_encoding(call)] == []


def test_files_stay_readable_in_one_go():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


# Extras, by the only places that may import them when they are imported themselves.
EXTRAS = {"transformers": "hf", "huggingface_hub": "hf", "safetensors": "hf", "tokenizers": "hf", "lm_eval": "interop"}


def _at_import(tree: ast.AST) -> list[str]:
    """Packages imported outside of functions, so as soon as the module is."""
    names, waiting = [], list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module.split(".")[0])
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_extras_are_imported_by_their_own_package_alone(path):
    home = path.relative_to(PACKAGE).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [name for name in _at_import(tree) if EXTRAS.get(name, home) != home] == []
    for name in imported(path):
        assert home == "hf" or not name.startswith("hymba_lightning.hf"), f"{path.name} imports {name}"
