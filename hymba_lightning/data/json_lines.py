"""One value out of a line of JSON, in little memory whatever else the line holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

# A value takes up to a hundred bytes of memory and two of the line: as many as this are no burden.
MANY_VALUES = 1 << 20
SPACES = re.compile(r"[ \t\n\r]*")
Scan = Callable[[str, int], tuple[Any, int]]


def value_of(line: bytes, key: str) -> Any:
    """What `json.loads(line)[key]` is, where that is a text; where it is a list or an object, an empty one.

    Raises:
        ValueError: The line is no UTF-8, or no JSON.
        LookupError, TypeError, RecursionError: As of that expression.
    """
    if len(line) < MANY_VALUES or sum(map(line.count, (b"[", b"{", b","))) < MANY_VALUES:
        return json.loads(line.decode("utf-8"))[key]
    if lacks(line, key):
        raise KeyError(key)
    return _OneKey(key).decode(line.decode("utf-8"))[key]


def lacks(line: bytes, key: str) -> bool:
    """Whether a line cannot have a key; False where only reading it tells."""
    return b"\\" not in line and _quoted(key) not in line


@lru_cache(maxsize=8)
def _quoted(key: str) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass")


class _OneKey(json.JSONDecoder):
    """Keeps of all objects one key's value only, and nothing of lists; it refuses what its parent refuses."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        self.parse_array = self._list
        self.parse_object = self._object
        self.scan_once = py_make_scanner(self)

    def _list(self, start: tuple[str, int], scan: Scan) -> tuple[list[Any], int]:
        text, end = start
        end = _after_spaces(text, end)
        if text[end : end + 1] == "]":
            return [], end + 1
        while True:
            _, end = _scanned(scan, text, end)
            end, is_last = _after_delimiter(text, end, "]")
            if is_last:
                return [], end

    def _object(self, start: tuple[str, int], strict: bool, scan: Scan, *_: Any) -> tuple[dict[str, Any], int]:
        text, end = start
        kept: dict[str, Any] = {}
        end = _after_spaces(text, end)
        if text[end : end + 1] == "}":
            return kept, end + 1
        while True:
            if text[end : end + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, end)
            name, end = scanstring(text, end + 1, strict)
            end = _after_spaces(text, end)
            if text[end : end + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, end)
            value, end = _scanned(scan, text, _after_spaces(text, end + 1))
            if name == self._key:
                kept[name] = value
            end, is_last = _after_delimiter(text, end, "}")
            if is_last:
                return kept, end


def _after_spaces(text: str, start: int) -> int:
    found = SPACES.match(text, start)
    return start if found is None else found.end()


def _scanned(scan: Scan, text: str, start: int) -> tuple[Any, int]:
    try:
        return scan(text, start)
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _after_delimiter(text: str, start: int, last: str) -> tuple[int, bool]:
    """The position after a delimiter, and whether that delimiter ended the list or object."""
    end = _after_spaces(text, start)
    mark = text[end : end + 1]
    if mark not in (",", last):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return (end + 1, True) if mark == last else (_after_spaces(text, end + 1), False)
