"""Text from anywhere (names of runs, tensors, files) made safe for where it is shown."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

# Paths inside a line that start at a root, a home or above here; no fractions ("bits / byte"), no addresses of hosts.
PATHS = re.compile(
    r"""(?<![\w.:/~])(?:(?:file|sqlite):/*(?=/)|~[\w.-]*|\.\.)?(?:/[^\s"'`<>|:,;(){}\[\]/]+){2,}/?
                       |(?<![\w.:/~])(?:~[\w.-]*|\.\.)/[^\s"'`<>|:,;(){}\[\]/]+/?
                       |(?<!\w)(?:[A-Za-z]:|\\)\\(?:[^\s"'`<>|:]+)""",
    re.VERBOSE,
)
# Halves of surrogate pairs: no characters, but what Python puts in the place of bytes that are not UTF-8.
SURROGATES = re.compile("[\ud800-\udfff]")
WHOLE = re.compile(r"(?:~|[A-Za-z]:\\|\\\\|/(?!/)).*")


def printable(text: str, most: int | None = None) -> str:
    """The text without characters that would steer a terminal, its middle left out where it has over `most`."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} … {text[-(most // 2) :]}"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def as_html(text: str) -> str:
    """HTML that shows the text."""
    return html.escape(printable(text))


def without_folders(text: str, folder: Path) -> str:
    """The text as others may read it: paths into `folder` are relative to it, other absolute ones only names."""
    for known in dict.fromkeys((str(folder), os.path.realpath(folder))):
        if known != os.sep:
            text = text.replace(known + os.sep, "")
            text = re.sub(re.escape(known) + r"(?![\w.-])", lambda _: folder.name, text)
    return PATHS.sub(lambda match: _name(match[0]), text)


def values_without_folders(value: Any, folder: Path) -> Any:
    """`without_folders` of every text in lists and dictionaries, where a path is a whole text, spaces and all."""
    if isinstance(value, str):
        text = without_folders(value, folder)
        return _name(value) if WHOLE.fullmatch(value) and not value.startswith(str(folder) + os.sep) else text
    if isinstance(value, dict):
        return {key: values_without_folders(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [values_without_folders(inner, folder) for inner in value]
    return value


def _name(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or path
