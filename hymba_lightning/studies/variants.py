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
        if not isinstance(study.config, list) or not study.config:
            raise ValueError(
                f"{path}: config is {study.config!r}; a list of files is needed, such as [configs/demo.yaml]"
            )
        for name, values in {"common": study.common, "variants": study.variants, **_mapping(study.variants)}.items():
            if not isinstance(values, dict):
                raise ValueError(f"{path}: {name} is {values!r}; names of options with values are needed, or {{}}")
        for name in study.variants:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"{path}: a variant is called {name!r}, which cannot name the folder of its runs")
        if study.baseline not in study.variants:
            raise ValueError(f"{path}: baseline {study.baseline!r} is not among the variants {sorted(study.variants)}")
        if study.stage not in STAGES:
            raise ValueError(f"{path}: stage {study.stage!r} is unknown, choose from {', '.join(STAGES)}")
        return study

    def names(self, only: list[str] | None) -> list[str]:
        """The variants `only` names, all without it, and the baseline. Raises ValueError naming what is no variant."""
        unknown = [name for name in only or () if name not in self.variants]
        if unknown:
            raise ValueError(f"no such variants: {unknown}; choose from {list(self.variants)}")
        return [name for name in self.variants if only is None or name in only or name == self.baseline]


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
