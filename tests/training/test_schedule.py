"""Schedules against the formulas, at the ends and in between, as shares of runs of any length."""

import itertools
import math
from pathlib import Path

import pytest
import yaml

from hymba_lightning.run.run import ClockReading
from hymba_lightning.training.optim import OptimizerConfig
from hymba_lightning.training.schedule import (
    muon_momentum,
    warmdown_left,
    warmdown_left_of_steps,
    warmdown_lr_scale,
    warmup_lr_scale,
)

CONFIGS = Path(__file__).parents[2] / "configs"
REFERENCE = {
    "warmup_share": 0.0,
    "warmdown_iters": 3000,
    "warmdown_shape": "cosine",
    "lr_floor": 0.0,
    "muon_momentum_warmup_steps": 500,
}


def at_step(step, max_steps):
    """The clock's reading before a step of a run that a number of steps ends."""
    return ClockReading(
        step=step,
        elapsed=float(step),
        mean_step=1.0 if step else None,
        budget=None,
        progress=step / max_steps,
        remaining=None,
        max_steps=max_steps,
    )


def at_time(elapsed, budget, mean_step):
    """The clock's reading in a run that a budget ends."""
    step = round(elapsed / mean_step)
    return ClockReading(
        step=step,
        elapsed=elapsed,
        mean_step=mean_step if step else None,
        budget=budget,
        progress=elapsed / budget,
        remaining=budget - elapsed,
    )


def whole_run(config, readings):
    return [config.lr_scale(reading) for reading in readings], [config.momentum(reading) for reading in readings]


def test_warmup_goes_from_a_tenth_to_all_over_its_share():
    assert warmup_lr_scale(0.0, 0.2) == pytest.approx(0.1)
    assert warmup_lr_scale(0.1, 0.2) == pytest.approx(0.55)
    assert warmup_lr_scale(0.2, 0.2) == warmup_lr_scale(0.9, 0.2) == 1.0
    assert warmup_lr_scale(0.0, 0.0) == 1.0


def test_warmdown_is_the_last_share_of_the_run():
    assert warmdown_left(0.0, 0.4) == warmdown_left(0.6, 0.4) == 1.0
    assert warmdown_left(0.8, 0.4) == pytest.approx(0.5)
    assert warmdown_left(1.0, 0.4) == 0.0
    assert warmdown_left(1.0, 0.0) == 1.0
    assert warmdown_left(0.25, 1.0) == pytest.approx(0.75)


def test_warmdown_shapes_and_floor():
    assert warmdown_lr_scale(0.25, "linear") == 0.25
    assert warmdown_lr_scale(0.25, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.75)))
    assert warmdown_lr_scale(0.25, "sqrt") == pytest.approx(1 - math.sqrt(0.75))
    for shape in ("linear", "cosine", "sqrt"):
        assert warmdown_lr_scale(1.0, shape, 0.1) == pytest.approx(1.0)
        assert warmdown_lr_scale(0.0, shape, 0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"'exp'.*cosine"):
        warmdown_lr_scale(0.5, "exp")


def test_the_references_warmdown_starts_when_what_is_left_fits_it():
    clock = {"warmdown_iters": 3000, "mean_step": 0.08}  # the warmdown takes 240 s
    assert warmdown_left_of_steps(remaining_seconds=600.0, **clock) == 1.0
    assert warmdown_left_of_steps(remaining_seconds=240.0, **clock) == 1.0
    assert warmdown_left_of_steps(remaining_seconds=60.0, **clock) == pytest.approx(0.25)
    assert warmdown_left_of_steps(remaining_seconds=-1.0, **clock) == 0.0
    assert warmdown_left_of_steps(100, remaining_steps=100) == 1.0
    assert warmdown_left_of_steps(100, remaining_steps=25) == pytest.approx(0.25)
    assert warmdown_left_of_steps(100, remaining_seconds=50.0, mean_step=1.0, remaining_steps=25) == 0.25
    assert warmdown_left_of_steps(100, remaining_seconds=10.0, mean_step=1.0, remaining_steps=25) == 0.1


def test_no_warmdown_of_steps_without_limit_length_or_timed_step():
    assert warmdown_left_of_steps(100) == 1.0
    assert warmdown_left_of_steps(0, remaining_steps=0) == 1.0
    assert warmdown_left_of_steps(100, remaining_seconds=1.0, mean_step=None) == 1.0


def test_momentum_goes_from_start_to_end():
    assert muon_momentum(0.0) == 0.85
    assert muon_momentum(0.5) == pytest.approx(0.90)
    assert muon_momentum(1.0) == muon_momentum(9.0) == 0.95


@pytest.mark.parametrize("steps", [50, 60, 600, 10_000])
def test_runs_of_any_number_of_steps_warm_up_and_cool_down(steps):
    scales, momenta = whole_run(OptimizerConfig(), [at_step(step, steps) for step in range(steps)])
    assert 0 < scales[0] <= 0.11
    assert max(b - a for a, b in itertools.pairwise(scales)) < 0.25  # no jump
    assert max(scales) > 0.95
    assert scales.index(max(scales)) <= 0.25 * steps
    assert 0.1 <= scales[-1] < 0.15
    assert momenta[0] == 0.85
    assert momenta[steps // 2] == momenta[-1] == 0.95


@pytest.mark.parametrize("budget", [10.0, 20.0, 60.0, 600.0])
@pytest.mark.parametrize("mean_step", [0.08, 0.7])
def test_a_budget_gives_the_schedule_that_as_many_steps_give(budget, mean_step):
    steps = int(budget / mean_step)
    timed = whole_run(
        OptimizerConfig(), [at_time(step * mean_step, steps * mean_step, mean_step) for step in range(steps)]
    )
    counted = whole_run(OptimizerConfig(), [at_step(step, steps) for step in range(steps)])
    assert timed[0] == pytest.approx(counted[0])
    assert timed[1] == pytest.approx(counted[1])


def test_the_references_constants_give_the_references_schedule():
    config = OptimizerConfig(**REFERENCE)
    scales, momenta = whole_run(config, [at_step(step, 7000) for step in range(7000)])
    assert scales[:4001] == [1.0] * 4001
    for step in (4500, 5500, 6999):
        assert scales[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 - (7000 - step) / 3000))))
    assert momenta[0] == 0.85
    assert momenta[250] == pytest.approx(0.9)
    assert momenta[500] == momenta[6999] == 0.95
    assert config.lr_scale(at_time(540.0, 600.0, 0.08)) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.75)))


def test_the_references_config_gives_the_references_schedule_alone_and_over_the_32k_config():
    files = [yaml.safe_load((CONFIGS / name).read_text())["model"] for name in ("hymba_32k.yaml", "reference.yaml")]
    expected = OptimizerConfig(**REFERENCE)
    readings = [at_step(step, 7000) for step in (0, 100, 3999, 5000, 6999)] + [at_time(500.0, 600.0, 0.08)]
    for settings in (files[1]["optimizer"], files[0]["optimizer"] | files[1]["optimizer"]):
        config = OptimizerConfig(**settings)
        assert config.embed_lr == 0.05
        assert whole_run(config, readings) == whole_run(expected, readings)
    assert (files[1]["average"], files[1]["ema_decay"]) == ("ema", 0.997)


def test_switched_off_parts_do_nothing():
    config = OptimizerConfig(warmup_share=0, warmdown_share=0, momentum_warmup_share=0)
    scales, momenta = whole_run(config, [at_step(step, 20) for step in range(20)])
    assert set(scales) == {1.0}
    assert set(momenta) == {0.95}
    assert OptimizerConfig(warmup_share=0, warmdown_iters=0).lr_scale(at_step(19, 20)) == 1.0
    assert OptimizerConfig(muon_momentum_warmup_steps=0).momentum(at_step(0, 20)) == 0.95


def test_lengths_longer_than_the_run_are_named_with_what_they_cause_and_the_remedy():
    config = OptimizerConfig(**REFERENCE)
    assert config.lengths_beyond(7000) == []
    warmdown, momentum = config.lengths_beyond(60)
    assert "warmdown_iters 3000 is longer than this run of about 60 steps" in warmdown
    assert "0.099 %" in warmdown  # 0.5 (1 + cos(pi (1 - 60/3000)))
    assert "warmdown_share" in warmdown
    assert "muon_momentum_warmup_steps 500 is longer than this run of about 60 steps" in momentum
    assert "0.862" in momentum
    assert "momentum_warmup_share" in momentum
    assert OptimizerConfig().lengths_beyond(1) == []


def test_the_length_of_a_run_is_known_at_once_from_steps_and_from_a_budget_once_steps_are_timed():
    assert at_step(0, 60).expected_steps == 60
    assert at_time(0.0, 60.0, 1.0).expected_steps is None
    assert at_time(9.0, 60.0, 1.0).expected_steps is None
    assert at_time(10.0, 60.0, 1.0).expected_steps == 60
    assert at_time(3.0, 10.0, 1.0).expected_steps == 10
