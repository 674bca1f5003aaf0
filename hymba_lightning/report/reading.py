"""Files of a run read so that damage in one becomes a note, and every number taken from one is a number."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_lightning.yaml_text import load_yaml

# What a run writes has a handful of levels, and a value takes a byte or more; aliases of YAML can claim anything.
MOST_LEVELS, VALUES_A_BYTE = 64, 4


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The dictionary in a JSON file; empty where there is no such file, or with a note where it is damaged."""
    return _read(path, notes, json.loads)


def read_yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    """The dictionary in a YAML file, in the same way."""
    return _read(path, notes, load_yaml)


def _read(path: Path, notes: list[str], parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = path.read_bytes()
        content = parse(raw.decode("utf-8"))
        _check_size(content, VALUES_A_BYTE * len(raw))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} is damaged ({' '.join(str(error).split())}): what it holds is left out")
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        notes.append(f"{path.name} is damaged (no dictionary of named values): what it holds is left out")
        return {}
    return content


def _check_size(content: Any, most: int) -> None:
    """Raises ValueError where a value is nested too deep, or is more than `most` values."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, level = waiting.pop()
        count += 1
        if level > MOST_LEVELS or count > most:
            raise ValueError("it is nested too deep" if level > MOST_LEVELS else "its aliases stand for too much")
        if isinstance(value, dict | list):
            waiting += [(inner, level + 1) for inner in (value.values() if isinstance(value, dict) else value)]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return _is_field(value) and math.isfinite(value)


def take_numbers(content: dict[str, Any], names: Sequence[str], file: str, notes: list[str]) -> dict[str, Any]:
    """The named values that are numbers. Notes each that is something else; None counts as missing."""
    found = {name: content[name] for name in names if content.get(name) is not None}
    for name in [name for name, value in found.items() if not is_number(value)]:
        notes.append(f"{name} in {file} is no number: left out")
        del found[name]
    return found


def take_rows(rows: Any, fields: Sequence[str], file: str, notes: list[str]) -> list[dict[str, float]]:
    """The rows that have a number in every field; with a note on how many have not."""
    if rows is None:
        return []
    given = rows if isinstance(rows, list) else [rows]
    whole = [
        {name: row[name] for name in fields}
        for row in given
        if isinstance(row, dict) and all(_is_field(row.get(name)) for name in fields)
    ]
    if len(whole) < len(given):
        notes.append(f"{len(given) - len(whole)} of {len(given)} rows in {file} are damaged: left out")
    return whole


def _is_field(value: Any) -> bool:
    # A loss may be NaN or infinite: charts leave such points out. No integer of use is beyond a float's numbers.
    return isinstance(value, float) or (type(value) is int and abs(value) < sys.float_info.max)
