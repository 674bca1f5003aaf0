"""Learning-rate and momentum schedules: pure functions of what is left and what is done.

Sources: the clock-driven warmdown of the reference run (remaining time over the time that `warmdown_iters` steps
take), and the linear momentum warm-up that Muon runs use.
"""

import math
from typing import Literal

WarmdownShape = Literal["cosine", "linear"]


def warmdown_lr_scale(
    *,
    warmdown_iters: int,
    shape: WarmdownShape = "cosine",
    remaining_seconds: float | None = None,
    mean_step: float | None = None,
    remaining_steps: int | None = None,
) -> float:
    """Factor in [0, 1] for every learning rate.

    `frac` is the share of the warmdown that is still ahead: `remaining_seconds / (warmdown_iters * mean_step)` on a
    clock, `remaining_steps / warmdown_iters` over a step limit, the smaller of the two when both limits exist, and
    never more than 1. Without any limit, or before the first step was timed, there is no warmdown: the factor is 1.

    Args:
        warmdown_iters: length of the warmdown in optimizer steps; 0 turns it off.
        shape: "cosine" gives ½(1 + cos(π(1 − frac))), "linear" gives frac.
        remaining_seconds: usable seconds left on the clock, None without a budget.
        mean_step: mean seconds per optimizer step so far, None before the first step.
        remaining_steps: optimizer steps left, None without a step limit.

    Raises:
        ValueError: `shape` is unknown or `warmdown_iters` is negative.
    """
    if warmdown_iters < 0:
        raise ValueError(f"warmdown_iters is {warmdown_iters}; it must be 0 (no warmdown) or positive")
    frac = 1.0
    if warmdown_iters > 0:
        if remaining_seconds is not None and mean_step is not None and mean_step > 0:
            frac = min(frac, remaining_seconds / (warmdown_iters * mean_step))
        if remaining_steps is not None:
            frac = min(frac, remaining_steps / warmdown_iters)
    frac = max(frac, 0.0)
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - frac)))
    if shape == "linear":
        return frac
    raise ValueError(f"warmdown shape {shape!r} is unknown; use 'cosine' or 'linear'")


def muon_momentum(step: int, *, start: float = 0.85, end: float = 0.95, warmup_steps: int = 500) -> float:
    """Muon's momentum for optimizer step `step` (0-based): linear from `start` to `end` over `warmup_steps`."""
    if warmup_steps <= 0:
        return end
    f = min(step / warmup_steps, 1.0)
    return (1.0 - f) * start + f * end
