"""A parser's refusals in plain words: which option, what it takes, what it got. jsonargparse tells them as a tree."""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from jsonargparse._typehints import get_all_subclass_paths

from hymba_lightning.usage import did_you_mean

KEY = re.compile(r'Parser key "([^"]+)"')
GIVEN = re.compile(r"(?:Given|Got) value: (.*)")
NESTED = re.compile(r"NestedArg\(key='([^']*)', val=(.*)\)", re.DOTALL)
# What a package's absence is told by, in Lightning's words.
REQUIREMENT = re.compile(r"Requirement '([^']+)' not met")
# The beginnings of what jsonargparse says where an object cannot be made of what was given.
OBJECT = ("Does not validate against any of the Union subtypes", "Problem with given class_path")
NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    Any: "anything",
}
QUOTES = "'\""
LISTS = (list, tuple, set, collections.abc.Iterable, collections.abc.Sequence)


def describe(hint: Any) -> str:
    """A type as a user would say it.

    >>> describe(float | None)
    'a number or null'
    >>> describe(Literal["a", "b"])
    "'a' or 'b'"
    >>> describe(dict[str, float] | None)
    'a mapping of each name to a number or null'
    """
    named: dict[str, str] = {}
    for text in _alternatives(hint):
        named.setdefault(text.strip("'"), text)
    *most, last = named.values()
    return f"{', '.join(most)} or {last}" if most else last


def refusal(message: str, error: BaseException | None, parser: Any) -> str:
    """One sentence for what jsonargparse refuses.

    Args:
        message: Its text, of many lines.
        error: The exception that carries it, whose causes say which part was wrong.
        parser: The parser, whose options' types are known.
    """
    text = " ".join(message.split())
    needs_value = re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", text)
    if needs_value:
        return f"{needs_value[1]} needs a value"
    keys = KEY.findall(message)
    if not keys:
        found = _option_of(message, parser) if message.startswith(OBJECT) else None
        return text if found is None else _of_an_object(found.dest, found._typehint, message, error)
    name = keys[-1] if keys[-1].startswith(f"{keys[0]}.") else keys[0]
    hint = next((action._typehint for action in _typed(parser) if action.dest == name), None)
    if hint is None or "Unable to load config" in message.rpartition("Parser key")[2]:
        if "Unable to load config" in message and name == keys[-1]:
            value = re.findall(r"Unable to load config (.*)", message)[-1].strip("\"'")
            return f"--{name}: {_value(value)} is no YAML file, and no mapping of options to values"
        return f"--{name}: {_with_types(KEY.split(text)[-1].lstrip(' :'))}"
    if _classes(hint) and "class_path" not in str(hint):
        return _of_an_object(name, hint, message, error)
    expected, value = describe(hint), _value(_given(message))
    # What one thing is given for is a list of one.
    as_list = f"; did you mean [{value.strip(QUOTES)}]?" if expected == "a list" and value[:1] in QUOTES else ""
    # A name of digits is a number in YAML.
    bare = re.fullmatch(r"'?[-+.\d]+(e[-+]?\d+)?'?|true|false|null", value) and expected.startswith("text")
    quoted = ", which is none in YAML: put it in quotes there" if bare else ""
    return f"--{name}: expected {expected}, got {value}{as_list}{quoted}"


def _of_an_object(name: str, hint: Any, message: str, error: BaseException | None) -> str:
    """An option that names a class and its arguments: what is wrong is at the end of the causes."""
    nested = NESTED.search(_given(message))
    option = f"--{name}.{nested[1].removeprefix('init_args.')}" if nested else f"--{name}"
    value = _value(nested[2].strip("'") if nested else _given(message))
    kind = " or ".join(dict.fromkeys(found.__name__ for found in _classes(hint)))
    for cause in _causes(error):
        text = " ".join(str(cause).split())
        missing = REQUIREMENT.search(text)
        if missing:
            given = re.search(r"class_path '([^']+)'", message)
            what = given[1].rpartition(".")[2] if given else value
            return (
                f"--{name}: {what} needs the package {missing[1]}, which is not installed: pip install '{missing[1]}'"
            )
        if type(cause).__name__ == "UsageError":  # from the parser of the class's own arguments
            inner = text.partition("; `")[0]
            if inner.startswith("--"):
                return f"--{name}.{inner[2:]}"
            needed = inner.removeprefix("the following arguments are required: ")
            return f"--{name}: {inner}" if needed == inner else f"--{name} needs --{name}.{needed.split(', ')[0]}"
    last = " ".join(str(_causes(error)[-1]).split()) if error is not None else ""
    if last.startswith("Expected an instantiatable class"):
        return f"{option}: say first which {kind} it is of, with --{name}"
    if last.startswith(("Expected a dot import path", "Import path", "No module named", "module ")):
        known = [path.rpartition(".")[2] for found in _classes(hint) for path in get_all_subclass_paths(found)]
        near = did_you_mean(value.strip("'").rpartition(".")[2], dict.fromkeys(known))
        return f"--{name}: there is no {kind} {value}{near}"
    if last and not last.startswith(("Expected a", "Not a valid subclass", "Parser key", *OBJECT)):
        return f"--{name}: {last}"
    return f"--{name}: expected {describe(hint)}, got {value}"


def _option_of(message: str, parser: Any) -> Any:
    """The option whose types jsonargparse's message lists; None where no option has just these."""
    alike = (action for action in _typed(parser) if f"Subtypes: {list(typing.get_args(action._typehint))}" in message)
    return next(alike, None)


def _typed(parser: Any) -> Iterator[Any]:
    """The options whose types are known, those of subcommands too."""
    for action in parser._actions:
        if hasattr(action, "_typehint") and not action.dest.endswith(".help"):
            yield action
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            yield from _typed(inner)


def _alternatives(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for part in arguments:
            if not (part is int and float in arguments):
                yield from _alternatives(part)
    elif origin is Literal:
        yield from (repr(value) if isinstance(value, str) else str(value).lower() for value in arguments)
    elif origin in LISTS or hint in LISTS:
        yield "a list"
    elif origin is dict:
        yield NAMES[dict] if arguments[1] is Any else f"{NAMES[dict]} of each name to {describe(arguments[1])}"
    elif hint in NAMES:
        yield NAMES[hint]
    else:
        name = getattr(hint, "__name__", str(hint))
        yield f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _classes(hint: Any) -> list[type]:
    """The classes of which an object may be given."""
    found = []
    for part in typing.get_args(hint) or (hint,):
        if typing.get_args(part):
            found += _classes(part)
        elif inspect.isclass(part) and part not in NAMES and part not in LISTS:
            found.append(part)
    return list(dict.fromkeys(found))


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _given(message: str) -> str:
    """What was given, as the message's last part has it."""
    given = GIVEN.findall(message)
    return given[-1].strip() if given else ""


def _value(given: str) -> str:
    """As it would be written in YAML, and not longer than a line."""
    if given in ("None", "True", "False"):
        return {"None": "null"}.get(given, given.lower())
    return repr(given if len(given) <= 60 else f"{given[:57]}…")


def _with_types(text: str) -> str:
    """A sentence of jsonargparse's about something that is no option by itself."""
    for kind, name in NAMES.items():
        text = text.replace(f"a <class '{getattr(kind, '__name__', '')}'>", name)
    return re.sub(r"Expected (.*?)\. Got value: (.*)", lambda found: f"expected {found[1]}, got {found[2]!r}", text)
