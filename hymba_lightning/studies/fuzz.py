"""Files damaged and forged in every way, thousands of them: each must be refused clearly or read rightly.

A format (`studies/fuzz_formats.py`) is a maker (true content), a mutator (content, random → other content) and a reader
(path, content → what was read, or one of the `refusals`). Anything else that is raised is wrong, and ends the run.
"""

from __future__ import annotations

import enum
import random
import resource
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_lightning.files import write_atomic
from hymba_lightning.studies.arguments import StudyParser

JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**40,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    "\x1b[2J",
    "alias",
    "int",
    "float16",
    [],
    [0],
    [2**20, 2**20],
    [[]],
    {},
    {"q": 1},
]
HEADER = (
    "| format | tried | refused | right | says otherwise | wrong | slowest (ms) | largest (MB) |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Reading(enum.Enum):
    """What a reader made of a changed file that it did not refuse."""

    RIGHT = "what was written"
    OTHER = "what the file says now: it is a valid one without a checksum over what was changed"
    WRONG = "neither"


class NotTriedError(Exception):
    """A format cannot be tried, since its package is not installed."""


@dataclass(frozen=True)
class Format:
    """How one kind of file is made, changed and read."""

    name: str
    make: Callable[[Path], bytes]
    """Writes a true file at the path, beside it what belongs to it; returns its bytes."""
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, bytes], Reading]
    """Reads the file whose bytes are given. True files are read first."""
    refusals: tuple[type[Exception], ...]
    """What it may raise, in one line that names the file or another of its folder."""
    file: str = "file"
    """The file's name."""


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    name: str
    tried: int
    refused: int
    right: int
    other: int
    wrong: int
    slowest: float
    """Processor's seconds, of helper processes too."""
    largest: float
    """MB by which the process, or a helper, grew, as the kernel counts its peak."""
    example: str = ""
    """What was wrong first."""

    def row(self) -> str:
        return (
            f"| {self.name} | {self.tried:,} | {self.refused:,} | {self.right:,} | {self.other:,} | {self.wrong:,} | "
            f"{1000 * self.slowest:.0f} | {self.largest:.0f} |"
        )


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped; bytes lost, repeated, inserted, overwritten, zeroed; halves swapped; cut short; made longer."""
    kind, start = rng.randrange(9), rng.randrange(max(len(content), 1))
    length = rng.choice([1, 1, 2, 8, 64, 512, 4096])
    piece = content[start : start + length]
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[start + length :]
    if kind == 2:
        return content[:start] + piece + content[start:]
    if kind == 3:
        return content[:start] + bytes(len(piece)) + content[start + length :]
    if kind == 4:
        return content[:start] + rng.randbytes(len(piece)) + content[start + length :]
    if kind == 5:
        return content[:start] + rng.randbytes(length) + content[start:]
    if kind == 6:
        return content + rng.randbytes(length)
    if kind == 7:
        return content[start:] + content[:start]
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def edit(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part, at a random depth, replaced, removed or repeated."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        result: Any = value.copy()
        if rng.random() < 0.1:
            del result[key]
        elif isinstance(result, list) and rng.random() < 0.1:
            result.insert(key, value[key])
        else:
            result[key] = edit(value[key], rng)
        return result
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 16, 10**6])
    return rng.choice(JUNK)


def fuzz(form: Format, n: int, seed: int = 0, progress: Callable[[int], None] | None = None) -> Outcome:
    """Mutates a true file `n` times. Raises what a reader raises besides its refusals; counts what it reads wrongly."""
    rng = random.Random(seed)
    refused = 0
    counts = dict.fromkeys(Reading, 0)
    slowest, example = 0.0, ""
    with tempfile.TemporaryDirectory(prefix="hymba-fuzz-") as folder:
        path = Path(folder) / form.file
        true = form.make(path)
        if form.read(path, true) != Reading.RIGHT:
            raise ValueError(f"the true {form.name} is not read rightly")
        before = _peaks()
        for index in range(n):
            content = form.mutate(true, rng)
            path.write_bytes(content)
            started = _seconds()
            problem = ""
            try:
                reading = form.read(path, content)
                counts[reading] += 1
                problem = "read as something else" if reading == Reading.WRONG else ""
            except form.refusals as error:
                refused += _is_clear(error, path)
                counts[Reading.WRONG] += not _is_clear(error, path)
                problem = "" if _is_clear(error, path) else f"refused unclearly: {error!r}"
            example = example or (problem and f"{form.name}, number {index + 1}: {problem}")
            slowest = max(slowest, _seconds() - started)
            if progress is not None:
                progress(index + 1)
        grown = max(now - then for now, then in zip(_peaks(), before, strict=True))
    return Outcome(
        form.name,
        n,
        refused,
        counts[Reading.RIGHT],
        counts[Reading.OTHER],
        counts[Reading.WRONG],
        slowest,
        grown / 1024,
        example,
    )


def run(formats: Mapping[str, Callable[[], Format]], names: list[str], n: int, seed: int, out: Path | None) -> str:
    """Fuzzes the formats named, or all; the table (Markdown), which is also written to `out`.

    Raises ValueError for a format that is not known, or where something was read wrongly; NotTriedError where a package
    for one that is named is missing. Of all, those are left out, and the table says so.
    """
    unknown = [name for name in names if name not in formats]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]}: choose from {', '.join(formats)}")
    outcomes, lines = [], [HEADER]
    for name in names or formats:
        try:
            outcomes.append(fuzz(formats[name](), n, seed))
            lines.append(outcomes[-1].row())
        except NotTriedError as error:
            if names:
                raise
            lines.append(f"| {name}: not tried, {error} | | | | | | | |")
    table = "\n".join(lines)
    if out is not None:
        write_atomic(out, table + "\n")
    examples = [outcome.example for outcome in outcomes if outcome.wrong]
    if examples:
        raise ValueError("\n".join(["something was read wrongly:", *examples, table]))
    return table


def _is_clear(error: Exception, path: Path) -> bool:
    text = str(error)
    return (path.name in text or path.parent.name in text) and len(text.splitlines()) == 1


def _peaks() -> list[int]:
    """Largest resident KiB of this process and of its helpers until now."""
    return [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]


def _seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(args: list[str]) -> None:
    """`hymba study fuzz`."""
    from hymba_lightning.studies.fuzz_formats import FORMATS

    parser = StudyParser("fuzz", "Prints a table of how many were refused, read rightly and read wrongly.")
    parser.add_argument("formats", type=str, nargs="*", help=f"Of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--n", type=int, default=10_000, help="Mutations of each format")
    parser.add_argument("--seed", type=int, default=0, help="Of the mutations")
    parser.add_argument("--out", type=str, help="File that the table is written to, besides")
    options = parser.read(args)
    print(run(FORMATS, options.formats, options.n, options.seed, None if options.out is None else Path(options.out)))
