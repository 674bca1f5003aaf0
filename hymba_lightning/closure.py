"""The code that an evaluation of an artifact needs: which files, by reading imports, and how they are packed.

A submission's folder carries `evaluate.py` and one archive of sources, since both count against the limit in bytes: in
a tar.xz they take a quarter, in a zip, which packs each file by itself, two fifths. `tar tf` shows what is inside.
"""

from __future__ import annotations

import ast
import functools
import io
import lzma
import tarfile
from pathlib import Path

import hymba_lightning

ROOT = Path(hymba_lightning.__file__).parent
# Of files that their package imports by what is there: ops/registry.py, data/tokenizer.py.
PREFIXES = ("backend_", "tokenizer_")
# Entries that only make training on a CPU faster: an evaluation does without, by the op's other backends.
TRAINING_ONLY = {
    "leaky_square_mlp.backend_blocked",
    "rotary_norm.backend_numba",
    "scaled_sum.backend_numba",
    "sliding_window.backend_numba",
    "softcapped_cross_entropy.backend_numba",
}
# Scores an artifact with nothing but itself, the tokenizer and the validation shards.
REFEREE = "hymba_lightning.package.referee"
ARCHIVE = "code.tar.xz"
# Unpacked, since Triton reads the sources of its kernels from files.
EVALUATE = '''"""Scores artifact.hymba of this folder: python evaluate.py --data FOLDER_OF_SHARDS [--tokenizer MODEL]

The code is in code.tar.xz, as sources; it is unpacked into a temporary folder and run from there.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # A file beside this one takes no library's place.
    del sys.path[0]

import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.dont_write_bytecode = True

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="hymba-code-") as code:
        tarfile.open(FOLDER / "code.tar.xz").extractall(code, filter="data")
        sys.path.insert(0, code)
        from hymba_lightning.package.digests import DigestError, verify_folder

        try:
            digests = verify_folder(FOLDER)
            from hymba_lightning.package.referee import main

            main(FOLDER, digests)
        except DigestError as error:
            sys.exit(f"evaluate.py: {error}")
'''


@functools.cache
def evaluation_archive(mixer: str = "mamba") -> bytes:
    """The sources that `REFEREE` needs for a network with this mixer, as a tar.xz: the same bytes for the same."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in needed_files(REFEREE, f"hymba_lightning.model.mixers.{mixer}"):
            content = (ROOT.parent / file).read_bytes()
            # Without the file's own time, owner and mode.
            entry = tarfile.TarInfo(file.as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def evaluation_code_bytes(mixer: str = "mamba") -> int:
    """Bytes of the code that a submission's folder holds for a network with this mixer."""
    return len(EVALUATE.encode()) + len(evaluation_archive(mixer))


def needed_files(*modules: str) -> list[Path]:
    """Files of the package that importing `modules`, and calling into them, may import; relative to the package's
    parent.

    Raises ValueError where there is no such module.
    """
    for module in modules:
        if _file(module) is None:
            raise ValueError(f"there is no module {module}")
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in found or file is None:
            continue
        found[name] = file
        if file.name == "__init__.py":
            entries = [entry for prefix in PREFIXES for entry in file.parent.glob(f"{prefix}*.py")]
            names = [f"{name}.{entry.stem}" for entry in entries]
            waiting += [entry for entry in names if entry.removeprefix("hymba_lightning.ops.") not in TRAINING_ONLY]
        # Importing a.b.c runs a/__init__ and a/b/__init__ first.
        waiting += [name.rpartition(".")[0], *(_lazy_home(imported) or imported for imported in _imports(file))]
    return sorted(file.relative_to(ROOT.parent) for file in found.values())


def _file(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != ROOT.name:
        return None
    path = ROOT.joinpath(*parts[1:])
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return path.with_suffix(".py") if len(parts) > 1 and path.with_suffix(".py").is_file() else None


def _lazy_home(name: str) -> str | None:
    """The module of a name that its package's __init__ imports only when the name is asked for."""
    package, _, last = name.rpartition(".")
    file = _file(package)
    if file is None or file.name != "__init__.py":
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(
        (
            node.module
            for node in _types_only(tree)
            if isinstance(node, ast.ImportFrom) and last in [alias.name for alias in node.names]
        ),
        None,
    )


def _types_only(tree: ast.AST) -> list[ast.AST]:
    return [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    ]


def _imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = set(map(id, _types_only(tree)))
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
