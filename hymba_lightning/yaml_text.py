"""YAML in which every key stands once, and a number is what it looks like.

The library's own loaders let the last of several keys win in silence, and read 010 as 8 and 10:00 as 600.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MERGE = "tag:yaml.org,2002:merge"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class MisleadingError(yaml.MarkedYAMLError):
    """What YAML makes of a text is not what whoever wrote it meant."""


class KeyTwiceError(MisleadingError):
    """A key stands twice in one mapping, or an option both with dots and in a group."""


class UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, by libyaml where there is one, which refuses a second key of the same name.

    Args:
        text: The YAML.
        dotted: Whether the outermost keys are options, in which dots stand for groups: `a.b: 1` and `a: {b: 1}` are
            one, and a group replaces what options before it have said of it.
    """

    def __init__(self, text: str, dotted: bool = False) -> None:
        super().__init__(text)
        self.dotted = dotted

    def construct_document(self, node: Node) -> Any:
        """
        Raises:
            MisleadingError: a key stands twice, or a number looks like another.
        """
        self.check(node)
        return super().construct_document(node)

    def check(self, root: Node) -> None:
        """
        Raises:
            KeyTwiceError: a key stands twice.
            MisleadingError: a number looks like another one.
        """
        seen: dict[str, ScalarNode] = {}
        before: dict[str, ScalarNode] = {}
        waiting, done = [(root, "")], set()
        while waiting:
            node, path = waiting.pop()
            if isinstance(node, ScalarNode):
                self._check_number(node, path)
            # What an alias repeats; it may hold itself.
            if id(node) in done or not isinstance(node, MappingNode | SequenceNode):
                continue
            done.add(id(node))
            if isinstance(node, SequenceNode):
                waiting += [(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
                continue
            inner = []
            for name, key, value in self._keys(node, path):
                inner.append((value, name))
                if not self.dotted:
                    continue
                if not path and name in before:
                    first = before[name]
                    raise KeyTwiceError(
                        problem=f"{name} in line {_line(key)} replaces {first.value} of line {_line(first)}: "
                        "write both in one group",
                        problem_mark=key.start_mark,
                    )
                _note(seen, name, name, key)
                if not path:
                    parts = name.split(".")
                    before |= {".".join(parts[:end]): key for end in range(1, len(parts))}
            waiting += reversed(inner)

    def _check_number(self, node: ScalarNode, name: str) -> None:
        text = node.value
        if not node.style and node.tag in NUMBERS and (":" in text or re.fullmatch(r"[-+]?0[0-7_]+", text)):
            meant = self.construct_object(node)
            if ":" in text or int(text.replace("_", "")) != meant:
                raise MisleadingError(
                    problem=f"{name or 'the value'} is {text} in line {_line(node)}, which YAML reads as {meant}: "
                    f"write that, or '{text}' in quotes where a text is meant",
                    problem_mark=node.start_mark,
                )

    def _keys(self, node: MappingNode, path: str) -> Iterator[tuple[str, ScalarNode, Node]]:
        """Keys, by path too, and values; no key twice. `<<` takes another mapping's, which its own may overrule."""
        found: dict[Any, ScalarNode] = {}
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.tag != MERGE:
                name = f"{path}.{key.value}".lstrip(".")
                # As keys of a dictionary are compared: `yes` is `true`.
                _note(found, self.construct_object(key), name, key)
                yield name, key, value


def load_yaml(text: str, dotted: bool = False) -> Any:
    """The values in a YAML text. `dotted`: as of UniqueKeyLoader.

    Raises:
        yaml.YAMLError: It is none; MisleadingError where it says something else than it seems to.
    """
    loader = UniqueKeyLoader(text, dotted)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def check_keys(text: str) -> None:
    """
    Raises:
        yaml.YAMLError: The text is no YAML; MisleadingError where it says something else than it seems to.
    """
    loader = UniqueKeyLoader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            loader.check(root)
    finally:
        loader.dispose()


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _note(found: dict[Any, ScalarNode], meant: Any, name: str, key: ScalarNode) -> None:
    first = found.setdefault(meant, key)
    if first is not key:
        lines = sorted((_line(first), _line(key)))
        where = f"in line {lines[0]}" if lines[0] == lines[1] else f"in lines {lines[0]} and {lines[1]}"
        raise KeyTwiceError(problem=f"{name} stands twice, {where}: leave one out", problem_mark=key.start_mark)
