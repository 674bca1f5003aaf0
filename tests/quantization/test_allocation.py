"""The division of bytes against every possible one."""

import itertools
import random

import pytest

from hymba_lightning.quantization.precision import Option, allocate, lower_hull


def problem(seed: int, tensors: int = 5, choices: int = 4) -> dict[str, list[Option]]:
    """Options of random loss and bytes, neither convex nor sorted."""
    rng = random.Random(seed)
    return {
        f"t{index}": [Option(rng.uniform(0, 10), rng.randrange(1, 100), "int", factor) for factor in range(choices)]
        for index in range(tensors)
    }


def totals(choice) -> tuple[float, float]:
    return sum(option.loss for option in choice), sum(option.bytes for option in choice)


def best_of_all(options: dict[str, list[Option]], budget: float) -> float:
    """Least loss of any choice that fits; infinity where none does."""
    sums = (totals(choice) for choice in itertools.product(*options.values()))
    return min((loss for loss, n_bytes in sums if n_bytes <= budget), default=float("inf"))


@pytest.mark.parametrize("seed", range(30))
def test_nothing_of_as_few_bytes_has_less_loss(seed):
    """At the choice that a price of bytes makes, tensor by tensor, the walk stops exactly, and it is optimal."""
    options = problem(seed)
    for price in (0.01, 0.03, 0.1, 0.3):
        wanted = {
            name: min(choices, key=lambda option: option.loss + price * option.bytes)
            for name, choices in options.items()
        }
        loss, n_bytes = totals(wanted.values())
        assert allocate(options, n_bytes) == wanted
        assert loss == pytest.approx(best_of_all(options, n_bytes), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_any_budget_is_kept_and_nearly_made_the_best_of(seed):
    options = problem(seed)
    smallest = sum(min(option.bytes for option in choices) for choices in options.values())
    losses = []
    for budget in range(int(smallest), int(smallest) + 200, 7):
        chosen = allocate(options, budget)
        loss, n_bytes = totals(chosen.values())
        assert n_bytes <= budget
        assert all(option in options[name] for name, option in chosen.items())
        steps = [a.loss - b.loss for hull in map(lower_hull, options.values()) for a, b in itertools.pairwise(hull)]
        best = best_of_all(options, budget)
        assert best - 1e-9 <= loss <= best + max(steps, default=0.0) + 1e-9
        losses.append(loss - best)
    assert sum(gap == pytest.approx(0, abs=1e-12) for gap in losses) > len(losses) / 3


def test_bytes_left_over_go_to_a_step_that_fits():
    options = {
        "large": [Option(10, 10, "int"), Option(0, 60, "int")],
        "small": [Option(1, 10, "int"), Option(0.9, 20, "int")],
    }
    assert totals(allocate(options, 69).values()) == (10.9, 30)  # the large step would pay more, and does not fit
    assert totals(allocate(options, 70).values()) == (1, 70)
    assert totals(allocate(options, 80).values()) == (0.9, 80)


def test_a_budget_that_nothing_fits_gives_the_smallest():
    options = problem(0)
    assert totals(allocate(options, 0).values())[1] == sum(
        min(option.bytes for option in choices) for choices in options.values()
    )


def test_the_order_of_tensors_and_options_does_not_matter():
    options = problem(3)
    turned = {name: list(reversed(choices)) for name, choices in reversed(options.items())}
    for budget in range(50, 400, 25):
        assert allocate(options, budget) == allocate(turned, budget)


def test_the_hull_drops_what_no_price_makes_best():
    options = [
        Option(10, 1, "a"),
        Option(9, 5, "concave"),
        Option(2, 6, "b"),
        Option(3, 7, "worse"),
        Option(1, 9, "c"),
        Option(1, 12, "dear"),
        Option(4, 6, "same bytes"),
    ]
    assert [option.storage for option in lower_hull(options)] == ["a", "b", "c"]
