"""p-values of differences between runs, by t-tests of SciPy: the only part of the package that needs it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

INSTALL = "pip install 'hymba-lightning[studies]'"


@dataclass(frozen=True)
class Test:
    """A one-sided test that our mean is lower than a baseline's by more than a margin."""

    difference: float
    """Baseline's mean minus ours."""
    t: float
    degrees: float
    p: float
    """Probability of a t at least as large where the true difference is the margin."""


def scipy_stats() -> ModuleType:
    """`scipy.stats`; called before the runs of a study, so that none is made in vain.

    Raises ImportError with the command that installs it.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(f"a p-value needs scipy, which is not installed: {INSTALL}") from error
    return stats


def better_than(ours: Sequence[float], baseline: Sequence[float], margin: float = 0.0) -> Test:
    """Welch's t-test (1947), one-sided; with a single baseline value, the one-sample test against it.

    Raises ValueError for fewer than two of our values, or none of the baseline's; ImportError without SciPy.
    """
    if len(ours) < 2 or not baseline:
        raise ValueError(f"a p-value needs at least 2 seeds and 1 baseline value, got {len(ours)} and {len(baseline)}")
    difference = statistics.mean(baseline) - statistics.mean(ours)
    if len(set(ours)) == len(set(baseline)) == 1:
        return Test(difference, math.copysign(math.inf, difference - margin), math.inf, float(difference <= margin))
    stats, bound = scipy_stats(), [value - margin for value in baseline]
    if len(bound) > 1:
        found = stats.ttest_ind(ours, bound, equal_var=False, alternative="less")
    else:
        found = stats.ttest_1samp(ours, bound[0], alternative="less")
    return Test(difference, -float(found.statistic), float(found.df), float(found.pvalue))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t-test on differences of pairs: nan for fewer than two, or for all the same.

    Raises ImportError without SciPy.
    """
    if len(set(differences)) < 2:
        return math.nan
    return float(scipy_stats().ttest_1samp(differences, 0.0).pvalue)
