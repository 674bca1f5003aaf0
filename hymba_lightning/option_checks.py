"""What a command line or a config may not say though its parser takes it: groups that are values, names of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ActionConfigFile, Namespace

from hymba_lightning.errors import UsageError
from hymba_lightning.usage import unknown
from hymba_lightning.yaml_text import load_yaml

# Options that are a file or a folder. Empty they would be the current folder, or none.
PATHS = frozenset(("ckpt", "ckpt_path", "data_dir", "dirpath", "file", "out", "path", "report", "run", "run_dir"))
PATHS |= {"start_from", "tokenizer", "train_gpt", "weights"}
LARGEST = 1 << 62
UNSET = "a shell makes that of a variable that is not set"


def check_groups(parser: Any, config: Any) -> None:
    """
    Raises:
        UsageError: a group of options, such as `trainer`, was given something that holds no options.
    """
    dests = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
    own = {action.dest for action in parser._actions if hasattr(action, "_typehint")}
    groups = {".".join(parts[:end]) for parts in (dest.split(".") for dest in dests) for end in range(1, len(parts))}
    for group in sorted(groups - own):
        value = config.get(group, {})
        if not isinstance(value, Namespace | dict):
            example = next(dest for dest in dests if dest.startswith(f"{group}."))
            given = "null" if value is None else value
            raise UsageError(f"{group} is {given!r}, and has to be a mapping of options, such as {example}, to values")
    for action in parser._actions:
        for name, inner in (getattr(action, "_name_parser_map", None) or {}).items():
            if name in config:
                check_groups(inner, config[name])


def check_empty(parser: Any, config: Any) -> None:
    """
    Raises:
        UsageError: a config's file has an unknown name without a value, which the parser would drop silently.
    """
    dests = [action.dest for action in parser._actions]
    objects = [action.dest for action in parser._actions if hasattr(action, "_typehint")]
    files = [action.dest for action in parser._actions if isinstance(action, ActionConfigFile)]
    for path in [path for dest in files for path in config.get(dest) or []]:
        for name in _empty(load_yaml(Path(str(path)).read_text(encoding="utf-8"))):
            known = any(f"{dest}.".startswith(f"{name}.") for dest in dests)
            if not known and not any(name.startswith(f"{dest}.") for dest in objects):
                raise unknown("key", name, option_names(parser), parser.prog.replace(" [options]", ""))
    for action in parser._actions:
        for name, inner in (getattr(action, "_name_parser_map", None) or {}).items():
            if name in config:
                check_empty(inner, config[name])


def check_nulls(parser: Any, config: Any) -> None:
    """
    Raises:
        UsageError: an option was given null, which is none of its values. The parser takes it for any.
    """
    for action in parser._actions:
        for name, inner in (getattr(action, "_name_parser_map", None) or {}).items():
            if name in config:
                check_nulls(inner, config[name])
        hint = getattr(action, "_typehint", None)
        if action.dest == "seed_everything":
            continue  # Lightning's: null is no seed
        if hint is None or action.default is None or action.dest not in config or config.get(action.dest) is not None:
            continue
        if type(None) not in get_args(hint) and hint is not Any:
            raise UsageError(
                f"{action.dest} is null, which is none of its values: leave it out for {action.default!r}, or name one"
            )


def check_values(config: Any, inside: str = "") -> None:
    """
    Raises:
        UsageError: a file or folder has no name, or a number is larger than machines count.
    """
    for key, value in vars(config).items():
        name = f"{inside}{key}"
        if isinstance(value, Namespace):
            # Options of a subcommand have names of their own.
            check_values(value, "" if name in ("fit", "validate", "test") else f"{name}.")
        elif key in PATHS and "" in (value if isinstance(value, list) else [value]):
            raise UsageError(f"{name} is empty: {UNSET}; name a file or folder, or leave it out")
        elif type(value) is int and abs(value) >= LARGEST:
            raise UsageError(f"{name} is {value}, and larger than numbers can be here: give one below 2^62")


def _empty(content: dict[str, Any], inside: str = "") -> Iterator[str]:
    """Dotted names of the empty mappings."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _empty(value, f"{inside}{key}.") if value else [f"{inside}{key}"]


def option_names(parser: Any) -> list[str]:
    """The options of a parser and of its subcommands."""
    names = [name for name in parser._option_string_actions if name.startswith("--")]
    for action in parser._actions:  # a parser of subcommands knows none of their options
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            names += option_names(inner)
    return [name for name in names if not name.endswith((".help", "+"))]
