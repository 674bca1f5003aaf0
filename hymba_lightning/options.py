"""Parsers of the command line: an error is one sentence, and help begins with this package's options."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from hymba_lightning.errors import UsageError, refused
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.model.mixers import MIXERS
from hymba_lightning.option_checks import UNSET, check_empty, check_groups, check_nulls, check_values, option_names
from hymba_lightning.plain import OBJECT, refusal
from hymba_lightning.training.optimizers import OPTIMIZERS
from hymba_lightning.usage import unknown
from hymba_lightning.yaml_text import MisleadingError, check_keys, load_yaml

_read_value = get_loader("yaml")


def read_help(args: Sequence[str]) -> None:
    """Lets parsers to come take a field's help from the docstring below it, where `args` ask for help: to read these
    takes longer than all the rest of a parser."""
    names = [arg.partition("=")[0] for arg in args]
    asked = any(name in ("-h", "--help", "--print_config") or name.endswith(".help") for name in names)
    set_parsing_settings(docstring_parse_attribute_docstrings=asked)


# Values with a key twice, and which one: the parsers try types one after another, and what is no YAML may be text.
_twice: dict[str, str] = {}


def _read_checked(text: str) -> Any:
    """What the parsers read a value with, or a file that stands for one."""
    try:
        check_keys(text)
    except MisleadingError as error:
        _twice[text] = error.problem
        raise
    return _read_value(text)


def _refused_for_a_key(refusal: str, args: Sequence[str]) -> str | None:
    """A sentence in place of a parser's refusal of a value that has a key twice, of its own or in the file it names."""
    option = ""
    for arg in args:
        name, sign, value = arg.partition("=") if arg.startswith("--") else (option, "", arg)
        option = "" if sign else name
        file, content = Path(value), value
        with contextlib.suppress(OSError, ValueError):
            content = file.read_text(encoding="utf-8") if file.is_file() else value
        problem = _twice.get(content) or _twice.get(content.strip())
        if problem and (problem in refusal or value[:SHOWN] in refusal):
            return f"{name} {value}: {problem}"
    # Of a file that a config names.
    problem = next(iter(_twice.values()), "")
    named, sign, _ = refusal.partition(" is no YAML file")
    return f"{named}: {problem}" if problem and sign else None


set_loader("yaml", _read_checked, (yaml.YAMLError,))

# Options that are text to work on, whatever it looks like.
TEXTS = ("prompt",)
# Characters of a value that surely stand in its refusal.
SHOWN = 40


class OneSentence:
    """Mixed into a parser: errors are raised as UsageError, with the near misses of an unknown name.

    Options have to be written out, and a path that begins with ~ lies in the user's folder.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would mean something else as soon as an option is added.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

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
            name = message.removeprefix("unrecognized arguments: ").split(" ")[0].partition("=")[0]
            if not name:
                raise UsageError(f"an argument is empty: {UNSET}; leave it out") from ex
            kind = "option" if name.startswith("-") else "argument"
            required = [action for action in parser._actions if action.required and action.option_strings]
            if kind == "argument" and required:
                option = required[0].option_strings[-1]
                raise UsageError(
                    f"{name} stands alone: did you mean {option} {name}? `{command} --help` explains"
                ) from ex
            raise unknown(kind, name, option_names(parser), command) from ex
        group = re.fullmatch(r"Group '(\S+)' does not accept option '(\S+)'", message)
        key = re.fullmatch(r"(?:Subcommand '\S+' does not accept option|Option) '(\S+?)'( is not accepted.*)?", message)
        if group or key:
            name = ".".join(group.groups()) if group else key[1] if key else ""
            raise unknown("key", name, option_names(parser), command) from ex
        raise UsageError(refusal(message, ex, parser)) from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UsageError: the arguments cannot be understood.
        """
        _twice.clear()
        try:
            config = super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except UsageError as error:
            told = _refused_for_a_key(str(error), (args[0] if args else kwargs.get("args")) or [])
            if told is None:
                raise
            raise UsageError(told) from error
        check_groups(self, config)
        check_empty(self, config)
        check_nulls(self, config)
        check_values(config)
        return _at_home(config)

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UsageError: an object cannot be made of what was given for it.
        """
        try:
            return super().instantiate_classes(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if str(error).startswith(OBJECT):
                raise UsageError(refusal(str(error), error, self)) from error
            raise

    def format_help(self, *args: Any) -> str:
        """The help text, with the names that can be chosen: backends of each op, mixers, optimizers and schemes."""
        tables = {f"runtime.{field.name}": field.metadata["op"] for field in fields(RuntimeConfig) if field.metadata}
        tables |= dict.fromkeys(("quantization.scheme", "scheme"), "schemes")
        tables |= {"net.mixer": "mixers", "optimizer.name": "optimizers"}
        for action in self._actions:  # type: ignore[attr-defined]
            table = next((table for option, table in tables.items() if f".{action.dest}".endswith(f".{option}")), None)
            if table is not None and choices(table) not in (action.help or ""):
                action.help = f"{(action.help or table).rstrip('.')}: {choices(table)}."
        return super().format_help(*args)  # type: ignore[misc]


def choices(table: str) -> str:
    """The backends of an op, the mixers, the optimizers or the quantization's schemes, in words."""
    if table == "mixers":
        return ", ".join(MIXERS)
    if table == "optimizers":
        return ", ".join(OPTIMIZERS)
    if table == "schemes":
        return importlib.import_module("hymba_lightning.quantization.schemes").in_words()
    registry = importlib.import_module("hymba_lightning.ops.registry")
    registry.register_all()
    return registry.in_words(table)


class CommandParser(OneSentence, ArgumentParser):
    """The parser of a command that is no subcommand of Lightning's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """
        Raises:
            UsageError: always; what is missing is told with what it is.
        """
        needed = re.fullmatch(r"the following arguments are required: ([\w.-]+).*", message)
        action = next((action for action in self._actions if needed and action.dest == needed[1].lstrip("-")), None)
        if needed and action is not None and action.help:
            what = action.help.partition(" (")[0].rstrip(".")
            name = action.option_strings[-1] if action.option_strings else needed[1]
            raise UsageError(f"{name} is required: {what}; `{self.prog} --help` explains") from ex
        super().error(message, ex)


def positionals_first(parser: CommandParser, args: list[str]) -> list[str]:
    """`args` with the positional arguments moved to the front, since argparse wants them to stand together."""
    in_front: list[str] = []
    behind: list[str] = []
    takes: int | float = 0
    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            name, _, value = arg.partition("=")
            action = parser._option_string_actions.get(name)
            nargs = getattr(action, "nargs", None)
            takes = 0 if value or nargs == 0 else float("inf") if nargs in ("+", "*") else 1
            behind.append(arg)
        elif takes:
            takes -= 1
            behind.append(arg)
        else:
            in_front.append(arg)
    return [*in_front, *behind]


def with_config_files(args: list[str]) -> list[str]:
    """The arguments with each --config as a file: one that is none is looked for among those that are shipped.

    Raises:
        UsageError: a file that is given with --config is missing, no YAML, or no mapping of names to values.
    """
    found = list(args)
    for index, arg in enumerate(args):
        option, sign, name = arg.partition("=")
        if option not in ("-c", "--config"):
            continue
        if sign:
            found[index] = f"{option}={_config_file(name)}"
        else:
            found[index + 1 : index + 2] = [_config_file(args[index + 1] if index + 1 < len(args) else "")]
    return found


def shipped_configs(folder: str = "") -> dict[str, Path]:
    """Name → file of the configs that come with the package: inside it once installed, beside it in a checkout.

    Args:
        folder: Among the configs, such as "studies"; by default that of `hymba fit`'s.
    """
    package = Path(__file__).parent
    configs = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package)
    return {path.stem: path for path in sorted((configs / folder).glob("*.yaml"))}


def _config_file(name: str) -> str:
    """A file with settings, checked; `best`, `best.yaml` and `configs/best.yaml` name a shipped one."""
    if not name or name.startswith("--"):
        raise UsageError("--config needs a file, such as configs/demo.yaml")
    path, _ = read_settings(name, "--config ", "configs", "model: {budget_seconds: 90}", options=True)
    return str(path)


def settings_file(name: str, folder: str = "configs") -> Path:
    """The file that is meant: of this name, or else the shipped one in `folder`."""
    path = Path(name).expanduser()
    if not path.exists() and path.parent.as_posix() in (".", folder):
        path = shipped_configs(folder.partition("/")[2]).get(path.name.removesuffix(".yaml"), path)
    return path


def read_settings(
    name: str, option: str, folder: str, example: str, options: bool = False
) -> tuple[Path, dict[str, Any]]:
    """File and content of a YAML file with a mapping.

    Args:
        name: A file, or a shipped one by its name, with or without ending and folder.
        option: What stands before the name in an error.
        folder: Where the shipped ones lie, `configs` or a folder in it.
        example: What such a file might hold.
        options: Whether its names are options, in which dots stand for groups.

    Raises:
        UsageError: there is no such file, it cannot be read, holds no mapping, or a name twice.
    """
    path, shipped = settings_file(name, folder), shipped_configs(folder.partition("/")[2])
    known = f"; the shipped ones are {', '.join(shipped)}" if shipped else ""
    kind = _kind(path)
    if kind:
        inside = [str(path / "config.yaml")] if (path / "config.yaml").is_file() else []
        near = inside or (
            [f"{path.name}.yaml"] if path.name in shipped and not Path(f"{path.name}.yaml").exists() else []
        )
        hint = f" (did you mean {option}{near[0]}?)" if near else known
        raise UsageError(f"{option}{name} is {kind}, and a YAML file is needed{hint}")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), dotted=options)
    except FileNotFoundError:
        raise UsageError(_missing(option, name, path, shipped)) from None
    except OSError as error:
        raise UsageError(f"{option}{name} cannot be read: {refused(error)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}{name} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except MisleadingError as error:
        raise UsageError(f"{option}{name}: {error.problem}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"{option}{name}{where}: this is no YAML: {reason}") from None
    if content is None:
        raise UsageError(f"{option}{name} is empty: names with values are needed, such as {example}")
    if not isinstance(content, dict):
        raise UsageError(
            f"{option}{name} holds a {type(content).__name__}; names with values are needed, such as {example}"
        )
    return path, content or {}


def _missing(option: str, name: str, path: Path, shipped: dict[str, Path]) -> str:
    """That there is no such file, those that may be meant, and which others are shipped."""
    beside = sorted(other for ending in ("*.yaml", "*.yml") for other in path.parent.glob(ending))
    spelled = {stem.lower(): stem for stem in shipped} | {other.stem.lower(): str(other) for other in beside}
    stem = path.name.removesuffix(path.suffix).lower().replace("-", "_")
    near = [spelled[match] for match in difflib.get_close_matches(stem, spelled)]
    asked = f" (did you mean {option}{' or '.join(near)}?)" if near else ""
    if not shipped:
        return f"{option}{name} does not exist{asked}"
    others = [stem for stem in shipped if stem not in near]
    folder = next(iter(shipped.values())).parent
    return f"{option}{name} does not exist{asked}; shipped with the package, in {folder}: {', '.join(others)}"


def _kind(path: Path) -> str:
    """What stands there instead of a file, in words; a pipe is none, since settings are read more than once."""
    kinds = {
        "a folder": path.is_dir,
        "a pipe": path.is_fifo,
        "a socket": path.is_socket,
        "a device": path.is_block_device,
    }
    return next((kind for kind, is_one in kinds.items() if is_one()), "")


def _at_home(value: Any) -> Any:
    """The same with every text that begins as a path in a user's folder written out: shells do so only at the start of
    a word, which the value in `--run_dir=~/a` or in a file is not.

    Raises:
        UsageError: there is no such user.
    """
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            if key not in TEXTS:
                setattr(value, key, _at_home(inner))
        return value
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    if not isinstance(value, str) or not re.match(r"~[\w-]*(/|$)", value):
        return value
    path = os.path.expanduser(value)
    if path == value:
        raise UsageError(f"{value} lies in the folder of a user who is not known here: write ./{value} if it does not")
    return path
