"""Schedules against the formulas, at the ends and in between."""

import math

import pytest

from hymba_lightning.training.optim import OptimizerConfig
from hymba_lightning.training.schedule import muon_momentum, warmdown_lr_scale


def test_warmdown_on_the_clock_starts_when_what_is_left_fits_the_warmdown():
    clock = {"warmdown_iters": 3000, "mean_step": 0.08}  # the warmdown takes 240 s
    assert warmdown_lr_scale(remaining_seconds=600.0, **clock) == 1.0
    assert warmdown_lr_scale(remaining_seconds=240.0, **clock) == 1.0
    assert warmdown_lr_scale(remaining_seconds=120.0, shape="linear", **clock) == pytest.approx(0.5)
    assert warmdown_lr_scale(remaining_seconds=60.0, shape="linear", **clock) == pytest.approx(0.25)
    assert warmdown_lr_scale(remaining_seconds=60.0, shape="cosine", **clock) == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 0.75))
    )
    assert warmdown_lr_scale(remaining_seconds=0.0, **clock) == pytest.approx(0.0)
    assert warmdown_lr_scale(remaining_seconds=-1.0, shape="linear", **clock) == 0.0


def test_warmdown_over_steps_and_the_nearer_of_two_limits():
    assert warmdown_lr_scale(warmdown_iters=100, remaining_steps=100) == 1.0
    assert warmdown_lr_scale(warmdown_iters=100, remaining_steps=25, shape="linear") == pytest.approx(0.25)
    both = {"warmdown_iters": 100, "shape": "linear", "mean_step": 1.0}
    assert warmdown_lr_scale(remaining_seconds=50.0, remaining_steps=25, **both) == pytest.approx(0.25)
    assert warmdown_lr_scale(remaining_seconds=10.0, remaining_steps=25, **both) == pytest.approx(0.1)


def test_no_warmdown_without_limit_length_or_timed_step():
    assert warmdown_lr_scale(warmdown_iters=100) == 1.0
    assert warmdown_lr_scale(warmdown_iters=0, remaining_steps=0) == 1.0
    assert warmdown_lr_scale(warmdown_iters=100, remaining_seconds=1.0, mean_step=None) == 1.0


def test_schedule_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'sqrt'.*cosine"):
        warmdown_lr_scale(warmdown_iters=1, shape="sqrt")
    with pytest.raises(ValueError, match="warmdown_iters is -1"):
        warmdown_lr_scale(warmdown_iters=-1)


def test_momentum_warms_up_linearly_over_500_steps():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(250) == pytest.approx(0.90)
    assert muon_momentum(500) == muon_momentum(5000) == 0.95
    assert muon_momentum(0, warmup_steps=0) == 0.95
    config = OptimizerConfig(muon_momentum=0.97, muon_momentum_start=0.9, muon_momentum_warmup_steps=10)
    assert config.momentum(5) == pytest.approx(0.935)
