"""Paths that users write: a path where it exists, a pattern only where none does."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def find_paths(pattern: str, folder: str | os.PathLike[str] = ".") -> list[Path]:
    """The path that `pattern` is, or else what it matches, sorted; relative ones are looked up in `folder`.

    The leading parts that exist as they stand are taken so: the brackets of a folder run[1] are part of its name.
    """
    base = Path(folder, os.path.expanduser(pattern))
    literal, rest = Path(base.anchor), list(base.parts[1 if base.anchor else 0 :])
    while rest and os.path.lexists(literal / rest[0]):
        literal /= rest.pop(0)
    if not rest:
        return [literal]
    matches = glob.glob(os.path.join(*rest), root_dir=literal, recursive=True)
    return sorted(literal / match for match in matches)
