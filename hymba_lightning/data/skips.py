"""Inputs that a preparation leaves out: counted by kind, the first of each kind named, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hymba_lightning.text import printable

NAMED = 10
NAMED_OF_A_KIND = 3
# Suffixes are kinds, and a folder of numbered files has as many of them as files.
MOST_KINDS = 20
OTHER_KINDS = "others"
# What a library or a file's own header says may be of any length, and hold anything.
MOST_CHARS = 1000


class Skips:
    """What was left out: a count for each kind, and the first few names.

    Args:
        strict: `add` raises instead of counting.
        remedy: What is said then.
    """

    def __init__(
        self, strict: bool = False, remedy: str = "leave it out, or prepare without strict to skip what cannot be read"
    ) -> None:
        self.strict, self.remedy = strict, remedy
        self.count = 0
        """Of all kinds."""
        self._first: list[str] = []
        self._kinds: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, dict[str, Any]] = {}

    def is_named(self, kind: str) -> bool:
        """Whether as many of a kind are named as may be: what is added of it is only counted."""
        known = self._kinds.get(kind)
        return (
            not self.strict
            and len(self._first) >= NAMED
            and known is not None
            and len(known["first"]) >= NAMED_OF_A_KIND
        )

    def add(self, kind: str, what: str | Callable[[], str]) -> None:
        """
        Args:
            kind: What is the matter, in a few words that many cases share.
            what: The file (and line), and the cause; where making it takes longer than counting, what makes it.

        Raises:
            ValueError: With strict.
        """
        if self.is_named(kind):
            self.count += 1
            self._kinds[kind]["count"] += 1
            return
        said = what if isinstance(what, str) else what()
        what = printable(said.replace("\n", " "), MOST_CHARS)
        if self.strict:
            raise ValueError(f"{what} ({kind}); {self.remedy}")
        self.count += 1
        if len(self._first) < NAMED:
            self._first.append(what)
        _count(self._kinds, kind, what, 1)

    def note(self, kind: str, what: str, number: int = 1) -> None:
        """Counts something that is reported but is no fault, as `add` counts what was left out."""
        _count(self._notes, kind, printable(what, MOST_CHARS), number)

    def merge(self, other: dict[str, Any]) -> None:
        """Adds what another one's `state` says."""
        self.count += other["count"]
        self._first = (self._first + other["first"])[:NAMED]
        for mine, theirs in ((self._kinds, other["kinds"]), (self._notes, other["notes"])):
            for kind, entry in theirs.items():
                known = _entry(mine, kind)
                known["count"] += entry["count"]
                known["first"] = (known["first"] + entry["first"])[:NAMED_OF_A_KIND]

    def state(self) -> dict[str, Any]:
        """The counts and names as plain values, for the manifest and for `restore`."""
        return {
            "count": self.count,
            "first": list(self._first),
            "kinds": _copy(self._kinds),
            "notes": _copy(self._notes),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what an earlier `state` said."""
        self.count, self._first = state["count"], list(state["first"])
        self._kinds, self._notes = _copy(state["kinds"]), _copy(state["notes"])


def skip_lines(state: dict[str, Any]) -> list[str]:
    """A manifest's account of them, a line a kind; older manifests know no kinds."""
    lines = []
    if state["count"]:
        kinds = state.get("kinds") or {"could not be read": {"count": state["count"], "first": state["first"]}}
        lines.append(f"  skipped {state['count']:,}:")
        lines += [_line(kind, entry) for kind, entry in sorted(kinds.items(), key=lambda item: -item[1]["count"])]
    return lines + [_line(kind, entry) for kind, entry in state.get("notes", {}).items()]


def shown(path: str | os.PathLike[str]) -> str:
    """A file's name for people: one line of printable characters, whatever bytes the name is made of."""
    text = os.fsencode(Path(path)).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _line(kind: str, entry: dict[str, Any]) -> str:
    more = "; …" if entry["count"] > len(entry["first"]) else ""
    return f"    {entry['count']:,} × {kind}: " + "; ".join(entry["first"]) + more


def _count(kinds: dict[str, dict[str, Any]], kind: str, what: str, number: int) -> None:
    entry = _entry(kinds, kind)
    entry["count"] += number
    if len(entry["first"]) < NAMED_OF_A_KIND and what not in entry["first"]:
        entry["first"].append(what)


def _entry(kinds: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    if kind not in kinds and len(kinds) >= MOST_KINDS:
        kind = OTHER_KINDS
    return kinds.setdefault(kind, {"count": 0, "first": []})


def _copy(kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {kind: {"count": entry["count"], "first": list(entry["first"])} for kind, entry in kinds.items()}
