"""What an ablation compares: a config, and variants of its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_lightning.options import read_settings
from hymba_lightning.studies.seeds import STAGES

# Where studies lie that come with the package, and what one begins like.
SHIPPED, EXAMPLE = "configs/studies", "config: [configs/demo.yaml]"
# What a variant says that is no option of `hymba fit`.
NO_OPTIONS = ("config", "seeds")
# What each run gets from the study.
OWN = ("run_dir", "ckpt_path", "overwrite", "seed_everything")


@dataclass(frozen=True)
class Study:
    """What to compare. `common` and each variant are options of `hymba fit`, as name: value; a variant's `config` (a
    list of files) stands in for the study's, and with `seeds` (a list) it is run with those among the seeds only."""

    config: list[str]
    baseline: str
    variants: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    stage: str = "ema"
    test: bool = False
    """Also run `hymba test` on every artifact."""

    @classmethod
    def from_yaml(cls, path: Path) -> Study:
        """Reads a study. Raises ValueError naming the file and what it lacks."""
        _, values = read_settings(str(path), "", SHIPPED, EXAMPLE)
        try:
            study = cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is no study ({error}): it needs config, baseline, variants") from error
        _check_files(path, "config", study.config)
        for name, values in {"common": study.common, "variants": study.variants, **_mapping(study.variants)}.items():
            if not isinstance(values, dict):
                raise ValueError(f"{path}: {name} is {values!r}; names of options with values are needed, or {{}}")
            if values is not study.variants:
                _check_options(path, name, values)
        if type(study.test) is not bool:
            raise ValueError(f"{path}: test is {study.test!r}; true or false is needed")
        for name in study.variants:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"{path}: a variant is called {name!r}, which cannot name the folder of its runs")
        if study.baseline not in study.variants:
            raise ValueError(f"{path}: baseline {study.baseline!r} is not among the variants {sorted(study.variants)}")
        if study.stage not in list(STAGES):
            raise ValueError(f"{path}: stage {study.stage!r} is unknown, choose from {', '.join(STAGES)}")
        return study

    def names(self, only: list[str] | None) -> list[str]:
        """The variants `only` names, all without it, and the baseline. Raises ValueError naming what is no variant."""
        unknown = [name for name in only or () if name not in self.variants]
        if unknown:
            raise ValueError(f"no such variants: {unknown}; choose from {list(self.variants)}")
        return [name for name in self.variants if only is None or name in only or name == self.baseline]

    def without_seed(self, seeds: Sequence[int], only: list[str] | None) -> list[str]:
        """Sentences on variants that none of `seeds` is for. Raises ValueError where that is so of all of them."""
        names = self.names(only)
        idle = [name for name in names if not set(self.variants[name].get("seeds", seeds)) & set(seeds)]
        notes = [
            f"{name} is for the seeds {self.variants[name]['seeds']} alone, and --seeds are {list(seeds)}"
            for name in idle
        ]
        if idle == names:
            raise ValueError(f"there is nothing to run: {'; '.join(notes)}")
        return notes


def _check_files(path: Path, name: str, files: Any) -> None:
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: {name} is {files!r}; a list of files is needed, such as [configs/demo.yaml]")


def _check_options(path: Path, name: str, values: dict[Any, Any]) -> None:
    """
    Raises:
        ValueError: an option that has no name of one, or that the study gives to each run itself.
    """
    for option, value in values.items():
        if not isinstance(option, str) or option.startswith("-"):
            raise ValueError(f"{path}: {name} has {option!r}; options go by their names, such as model.net.window")
        if option in OWN:
            raise ValueError(f"{path}: {name} has {option}, which the study gives to each run itself: leave it out")
        if option == "config":
            _check_files(path, f"config of {name}", value)
        if option == "seeds" and not (isinstance(value, list) and all(type(seed) is int for seed in value)):
            raise ValueError(f"{path}: seeds of {name} is {value!r}; a list of numbers is needed, such as [0, 1]")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def options(values: dict[str, Any]) -> list[str]:
    """{'model.net.window': 512} → ['--model.net.window', '512']. `config` and `seeds` are left out."""
    flat: list[str] = []
    for name, value in values.items():
        if name in NO_OPTIONS:
            continue
        flat += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flat


def arguments_of(study: Study, variant: str, seed: int, extra: Sequence[str] = ()) -> list[str]:
    """Options of `hymba fit` for a variant and a seed; `extra` holds for all."""
    changes = study.variants[variant]
    files = [part for config in changes.get("config", study.config) for part in ("--config", config)]
    return [*files, *options(study.common), *options(changes), "--seed_everything", str(seed), *extra]
