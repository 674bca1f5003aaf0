"""Parsers of the command line: errors in one sentence instead of all there is, and help that begins with ours."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from hymba_lightning.errors import UsageError
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.usage import unknown

# jsonargparse's words for types, and ours.
TYPES = (
    ("a <class 'int'>", "a whole number"),
    ("a <class 'float'>", "a number"),
    ("<class 'null'>", "null"),
    ("a <class 'bool'>", "true or false"),
    ("a <class 'str'>", "text"),
    ("a typing.Literal", "one of "),
    ("<class 'int'>", "a whole number"),
    ("<class 'float'>", "a number"),
    ("<class 'bool'>", "true or false"),
    ("<class 'str'>", "text"),
    ("typing.", ""),
    ("NoneType", "null"),
)


class OneSentence:
    """Mixed into a parser: errors are raised as UsageError, with the near misses of an unknown name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """
        Raises:
            UsageError: always.
        """
        if isinstance(ex, UsageError):
            raise ex
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2].partition("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            raise unknown(kind, name, _names(parser), command) from ex
        group = re.fullmatch(r"Group '(\S+)' does not accept option '(\S+)'", message)
        key = re.fullmatch(r"(?:Subcommand '\S+' does not accept option|Option) '(\S+?)'( is not accepted.*)?", message)
        if group or key:
            name = ".".join(group.groups()) if group else key[1] if key else ""
            raise unknown("key", name, _names(parser), command) from ex
        raise UsageError(_plain(message)) from ex

    def format_help(self, *args: Any) -> str:
        """With the backends of each op, and the schemes, from their tables."""
        tables = {f"runtime.{field.name}": field.metadata["op"] for field in fields(RuntimeConfig) if field.metadata}
        tables |= dict.fromkeys(("quantization.scheme", "scheme"), "schemes")
        for action in self._actions:  # type: ignore[attr-defined]
            table = next((table for option, table in tables.items() if f".{action.dest}".endswith(f".{option}")), None)
            if table is not None and choices(table) not in (action.help or ""):
                action.help = f"{(action.help or table).rstrip('.')}: {choices(table)}."
        return super().format_help(*args)  # type: ignore[misc]


def choices(table: str) -> str:
    """The backends of an op, or the quantization's schemes, in words."""
    if table == "schemes":
        return importlib.import_module("hymba_lightning.quantization.schemes").in_words()
    registry = importlib.import_module("hymba_lightning.ops.registry")
    registry.register_all()
    return registry.in_words(table)


class CommandParser(OneSentence, ArgumentParser):
    """The parser of a command that is no subcommand of Lightning's."""


def check_config_files(args: list[str]) -> None:
    """
    Raises:
        UsageError: a file that is given with --config is missing, no YAML, or no mapping of names to values.
    """
    pairs = [
        arg.split("=", 1) if "=" in arg else [arg, value] for arg, value in zip(args, [*args[1:], ""], strict=True)
    ]
    for name in (value for option, value in pairs if option in ("-c", "--config")):
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"--config {name} does not exist") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"--config {name} is no UTF-8 text: {error.reason} at byte {error.start}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            reason = getattr(error, "problem", None) or "it cannot be parsed"
            raise UsageError(f"--config {name}{where}: this is no YAML: {reason}") from None
        if content is not None and not isinstance(content, dict):
            raise UsageError(
                f"--config {name} holds a {type(content).__name__}; names with values are needed, such as "
                "model: {budget_seconds: 90}"
            )


def _names(parser: Any) -> list[str]:
    names = [name for name in parser._option_string_actions if name.startswith("--")]
    for action in parser._actions:  # a parser of subcommands knows none of their options
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            names += _names(inner)
    return [name for name in names if not name.endswith((".help", "+"))]


def _plain(message: str) -> str:
    """jsonargparse's text on one line, with the option in front and types in plain words."""
    text = " ".join(message.split())
    for theirs, ours in TYPES:
        text = text.replace(theirs, ours)
    found = re.fullmatch(r'Parser key "([^"]+)": (.*)', text)
    if found is None:
        return text
    name, text = found.groups()
    # The alternatives of a union, with the reason against each, say no more than what was given.
    text = re.sub(
        r"Does not validate against any of the Union subtypes.*? Subtypes: \[?(.*?)\]? Errors:.*? "
        r"Given value type: .*? Given value: (.*)",
        r"Expected one of \1. Got value: \2",
        text,
    )
    simple = re.fullmatch(r"Expected (.*?)\. Got value: (.*)", text)
    if simple:
        text = f"expected {simple[1]}, got {simple[2]!r}"
    return f"--{name}: {text[:1].lower()}{text[1:]}"
