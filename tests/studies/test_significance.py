"""Welch's and the paired t-test against printed tables, and what a study says without SciPy before it runs anything."""

import math
import statistics
import sys

import pytest

from hymba_lightning.studies import ablation, seeds
from hymba_lightning.studies.ablation import run_study
from hymba_lightning.studies.seeds import run_seeds
from hymba_lightning.studies.significance import better_than, paired_p
from hymba_lightning.studies.variants import Study


def sample(degrees, t):
    """Values whose mean is `t` standard errors above 0."""
    values = [float(value) for value in range(degrees + 1)]
    shift = t * statistics.stdev(values) / math.sqrt(len(values)) - statistics.mean(values)
    return [value + shift for value in values]


@pytest.mark.parametrize(
    ("p", "degrees", "t"),
    [
        # Quantiles of Student's distribution as printed in tables.
        (0.05, 1, 6.313752),
        (0.025, 2, 4.302653),
        (0.01, 5, 3.364930),
        (0.05, 10, 1.812461),
        (0.001, 30, 3.385185),
        (0.1, 4, 1.533206),
        (0.5, 7, 0.0),
    ],
)
def test_students_quantiles(p, degrees, t):
    lower = better_than(sample(degrees, -t), [0.0])
    assert (lower.p, lower.t, lower.degrees) == pytest.approx((p, t, degrees), rel=1e-5)
    assert better_than(sample(degrees, t), [0.0]).p == pytest.approx(1 - p, rel=1e-5)
    assert [paired_p(sample(degrees, s)) for s in (t, -t)] == pytest.approx([2 * p] * 2, rel=1e-5)


def test_welch_by_hand():
    # Means 2 and 4, variances 1 and 4, n 3 and 4: t = 2/sqrt(1/3 + 1), ν = (4/3)²/((1/3)²/2 + 1²/3).
    found = better_than([1.0, 2.0, 3.0], [4 - math.sqrt(6), 4.0, 4.0, 4 + math.sqrt(6)])
    assert found.difference == 2.0
    assert found.t == pytest.approx(2 / math.sqrt(4 / 3))
    assert found.degrees == pytest.approx((16 / 9) / (1 / 18 + 1 / 3))
    # By quadrature of the density of Student's distribution.
    assert found.p == pytest.approx(0.0746417, rel=1e-5)
    assert better_than([1.0, 2.0, 3.0], [4.0], margin=2.0).p == pytest.approx(0.5)


def test_values_without_spread_are_decided_without_a_test():
    assert better_than([5.0, 5.0], [4.0, 4.0]).p == 1.0
    assert better_than([3.0, 3.0], [4.0]).p == 0.0
    assert math.isnan(paired_p([1.0, 1.0]))
    assert math.isnan(paired_p([1.0]))
    with pytest.raises(ValueError, match="at least 2 seeds"):
        better_than([1.0], [2.0])


def test_without_scipy_a_study_says_so_before_its_first_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for module in (seeds, ablation):
        monkeypatch.setattr(module, "run_once", lambda *_, **__: pytest.fail("a run was made"))
    study = Study(config=["x"], baseline="plain", variants={"plain": {}}, common={}, test=False)
    needed = r"needs scipy, which is not installed: pip install 'hymba-lightning\[studies\]'"
    with pytest.raises(ImportError, match=needed):
        run_seeds([1, 2], tmp_path, [], baseline=[1.0])
    with pytest.raises(ImportError, match=needed):
        run_study(study, [1, 2], tmp_path, [], [None])
