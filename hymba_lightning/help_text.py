"""`hymba fit --help` without importing torch and Lightning, which alone takes longer than a reader should wait.

The text is made from the signatures by `python -m hymba_lightning.help_text` and kept in help/. It is used only while
the libraries it was made with are the ones installed; a test compares it with the live parser's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "help"
COMMANDS = ("fit", "validate", "test")
# Line width of the kept text: the terminal's would differ from call to call.
WIDTH = 110


def stamp() -> str:
    """Versions that the text depends on."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lightning", "jsonargparse"))


def kept_help(args: list[str]) -> str | None:
    """The kept help of `hymba <command> --help`, or None where the live parser has to answer."""
    if len(args) != 2 or args[0] not in COMMANDS or args[1] not in ("-h", "--help"):
        return None
    path = FOLDER / f"{args[0]}.txt"
    if not path.is_file():
        return None
    first, _, text = path.read_text().partition("\n")
    return text if first == f"# {stamp()}" else None


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


def main() -> None:
    """Writes the help of all commands."""
    FOLDER.mkdir(exist_ok=True)
    for command in COMMANDS:
        (FOLDER / f"{command}.txt").write_text(f"# {stamp()}\n{live_help(command)}")


if __name__ == "__main__":
    main()
