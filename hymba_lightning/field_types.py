"""A config's values are of its fields' types, whoever gives them: a checkpoint of others could be written, not read."""

import numbers
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
# Of values that are not of a type.
OTHER = object()


def settle(config: Any, prefix: str = "") -> None:
    """Makes each field of a dataclass a plain value of its type: numpy's numbers Python's, and tuples lists where those
    are declared, or the other way around. Raises ValueError naming the field whose value is of another, with `prefix`.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        plain = _plain(value, hint)
        if plain is OTHER:
            given = f"{str(value)[:40]!r} ({type(value).__name__})"
            raise ValueError(f"{prefix}{name} must be {_words(hint)}, got {given}")
        object.__setattr__(config, name, plain)


def _plain(value: Any, hint: Any) -> Any:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return next((plain for one in inner if (plain := _plain(value, one)) is not OTHER), OTHER)
    if kind in (list, tuple):
        if not isinstance(value, list | tuple):
            return OTHER
        parts = [_plain(part, inner[0]) for part in value]
        return OTHER if OTHER in parts else kind(parts)
    if kind is dict:
        if not isinstance(value, Mapping):
            return OTHER
        pairs = {_plain(key, inner[0]): _plain(part, inner[1]) for key, part in value.items()}
        return OTHER if OTHER in pairs or OTHER in pairs.values() else pairs
    if type(value) is kind or (kind is Literal and isinstance(value, str)):
        return value
    if isinstance(value, bool):
        return OTHER
    if kind is int and hasattr(value, "__index__") and isinstance(value, numbers.Integral):
        return operator.index(value)
    if kind is float and isinstance(value, numbers.Real):
        return value if type(value) is int else float(value)
    if kind is bool and type(value).__name__ in ("bool", "bool_"):  # numpy's
        return bool(value)
    return str(value) if kind is str and isinstance(value, str) else OTHER


def _words(hint: Any) -> str:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_words(one) for one in inner)
    if kind in (list, tuple):
        return f"a list, of {_words(inner[0])} each"
    if kind is dict:
        return f"a dictionary of names, with {_words(inner[1])} each"
    return WORDS.get(kind, "text")
