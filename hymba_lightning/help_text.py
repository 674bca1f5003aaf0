"""`hymba fit --help` without importing torch and Lightning, which alone takes longer than a reader should wait.

The parser's text is kept in the user's cache folder, under a name made of all that it depends on: this package's
sources and the libraries' versions. Where nothing can be kept there, the parser answers each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
from pathlib import Path

from hymba_lightning.files import write_atomic

COMMANDS = ("fit", "validate", "test")
# Line width of the kept text: the terminal's would differ from call to call.
WIDTH = 110
ROOT = Path(__file__).parent


def quick_help(args: list[str]) -> str | None:
    """The text of `hymba <command> --help`, None where `args` ask for something else."""
    if len(args) != 2 or args[0] not in COMMANDS or args[1] not in ("-h", "--help"):
        return None
    kept = kept_path(args[0])
    try:
        return kept.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = live_help(args[0])
        _keep(kept, text)
        return text


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/hymba_lightning, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "hymba_lightning"


def kept_path(command: str) -> Path:
    """Where the help of this very version of everything is kept."""
    return cache_folder() / f"help-{command}-{_fingerprint()}.txt"


def live_help(command: str) -> str:
    """What the parser itself prints for `hymba <command> --help`."""
    from hymba_lightning.cli import run

    out = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            run([command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return out.getvalue()


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for library in ("lightning", "jsonargparse", "torch"):
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for path in sorted(ROOT.rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _keep(path: Path, text: str) -> None:
    """Writes it in place of what older versions left; not at all where that is impossible."""
    with contextlib.suppress(OSError):
        for old in path.parent.glob(f"{path.name[: -len(_fingerprint()) - 4]}*.txt"):
            old.unlink(missing_ok=True)
        write_atomic(path, text)
