"""What the command lines of the studies share."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hymba_lightning import __version__
from hymba_lightning.device import device_of
from hymba_lightning.errors import UsageError
from hymba_lightning.options import CommandParser, positionals_first
from hymba_lightning.studies import STUDIES

# Whole numbers that may be 0, or any.
LEAST = {"warmup": 0, "layers": 0, "seed": None, "seeds": None}


class StudyParser(CommandParser):
    """The parser of `hymba study <name>`.

    Args:
        name: Of the study.
        about: What it does and writes, in a sentence or two, for the help.
        of_fit: What stands behind a -- are options of `hymba fit`.
    """

    def __init__(self, name: str, about: str, *, of_fit: bool = False) -> None:
        usage = f"hymba study {name} [options]{' -- [options of hymba fit]' if of_fit else ''}"
        line = STUDIES[name][1]
        line = f"{line[0].upper()}{line[1:]}{'' if line.endswith('?') else '.'}"
        super().__init__(prog=f"hymba study {name}", usage=usage, description=f"{line} {about}")
        self.of_fit = of_fit
        self.fit_options: list[str] = []

    def read(self, args: list[str]) -> Any:
        """The study's options; those behind -- are in `fit_options` afterwards.

        Raises:
            UsageError: they cannot be understood, or a number of something is below 1.
            ValueError: a device that is not here.
        """
        if self.of_fit and "--" in args:
            cut = args.index("--")
            args, self.fit_options = args[:cut], args[cut + 1 :]
            refused = {"--run_dir": "put every run in one folder", "--ckpt_path": "have every run go on from one place"}
            if any(action.dest == "seeds" for action in self._actions):
                refused["--seed_everything"] = "give every run one seed, whatever --seeds says"
            for option in self.fit_options:
                name = option.partition("=")[0]
                if name in refused:
                    raise UsageError(f"{name} behind -- would {refused[name]}: leave it out")
        given = self.parse_args(positionals_first(self, args))
        for name, value in vars(given).items():
            numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]
            least = LEAST.get(name, 1)
            if least is not None and numbers and min(numbers) < least:
                raise UsageError(f"--{name} must be at least {least}, got {min(numbers)}")
        if "device" in given:
            device_of(given.device)
        return given


def source_version() -> str:
    """The commit of the checkout that this package is in, else its version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        line = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
        if commit:
            return f"commit {commit}"
    return f"hymba_lightning {__version__}"
