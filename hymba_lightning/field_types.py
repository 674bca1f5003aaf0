"""A config's values are of its fields' types, whoever gives them: a checkpoint of others could be written, not read."""

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any, Literal, Union

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
# Of values that are not of a type.
OTHER = object()


def settle(config: Any, prefix: str = "") -> None:
    """Makes each field of a dataclass a plain value of its type: numbers of numpy and torch Python's, whole ones
    integers, and collections lists or tuples, as declared. Raises ValueError naming the field whose value is of another
    type, with `prefix`. Fields that a class outside the package adds or declares anew are its own.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        plain = _plain(value, hint)
        if plain is OTHER:
            given = f"{str(value)[:40]!r} ({type(value).__name__})"
            raise ValueError(f"{prefix}{name} must be {_words(hint)}, got {given}")
        object.__setattr__(config, name, plain)


def settled(prefix: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates an `__init__`, whose arguments become plain values of their types, as fields do by `settle`; paths are
    text. Of other arguments only configs are looked at: each is one, or the dictionary of its fields.

    What it makes raises ValueError naming an argument whose value is of another type, with `prefix`.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def checked(*args: Any, **kwargs: Any) -> None:
            given, hints = signature.bind(*args, **kwargs), typing.get_type_hints(init)
            for name, value in given.arguments.items():
                given.arguments[name] = _settled_argument(f"{prefix}{name}", value, hints.get(name))
            init(*given.args, **given.kwargs)

        # Who looks at the arguments (Lightning, where it loads a module) looks no further than this function.
        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorate


def _settled_argument(name: str, value: Any, hint: Any) -> Any:
    parts = typing.get_args(hint) or (hint,)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        plain, words = value if isinstance(value, hint | Mapping) else OTHER, f"of the kind {hint.__name__}"
        fields = [field.name for field in dataclasses.fields(hint)]
        strange = [key for key in value if key not in fields] if isinstance(value, Mapping) else []
        # Of a network, and how it is run, older versions' fields are known.
        if strange and not hasattr(hint, "from_dict"):
            raise ValueError(f"{name} has no {strange[0]!r}: it has {', '.join(fields)}")
    elif typing.get_origin(hint) is Literal or all(part in WORDS for part in parts):
        plain = _plain(os.fspath(value) if isinstance(value, os.PathLike) else value, hint)
        words = _words(hint)
    else:
        return value
    if plain is OTHER:
        raise ValueError(f"{name} must be {words}, got {str(value)[:40]!r} ({type(value).__name__})")
    return plain


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        own = inspect.get_annotations(base)
        known = typing.get_type_hints(base) if base.__module__.startswith("hymba_lightning.") else {}
        hints = {name: hint for name, hint in hints.items() if name not in own}
        hints |= {name: known[name] for name in own if name in known}
    return hints


def _plain(value: Any, hint: Any) -> Any:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    if type(value) is kind and not inner:
        return value
    if kind in (Union, types.UnionType):
        if type(value) in inner:
            return value
        return next((plain for one in inner if (plain := _plain(value, one)) is not OTHER), OTHER)
    if kind in (list, tuple):
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
            return OTHER
        parts = [_plain(part, inner[0]) for part in value]
        return OTHER if OTHER in parts else kind(parts)
    if kind is dict:
        if not isinstance(value, Mapping):
            return OTHER
        pairs = {_plain(key, inner[0]): _plain(part, inner[1]) for key, part in value.items()}
        return OTHER if OTHER in pairs or OTHER in pairs.values() else pairs
    if isinstance(value, str):
        # Not str(value), which of an enumeration's member is another text.
        return str.__str__(value) if kind in (str, Literal) else OTHER
    if kind is bool:
        return bool(value) if type(value) is int and value in (0, 1) else OTHER
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        return OTHER
    if isinstance(value, int):
        return int(value) if kind in (int, float) else OTHER
    if kind is float:
        return float(value)
    return int(value) if kind is int and math.isfinite(value) and value == int(value) else OTHER


def _words(hint: Any) -> str:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_words(one) for one in inner)
    if kind in (list, tuple):
        return f"a list, of {_words(inner[0])} each"
    if kind is dict:
        return f"a dictionary of names, with {_words(inner[1])} each"
    return WORDS.get(kind, "text")
