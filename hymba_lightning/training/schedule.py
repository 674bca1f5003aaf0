"""Learning-rate and momentum schedules: pure functions of the share of the run that is done.

The share is the clock's (of its budget or of max_steps, whichever is further on), so that one setting fits a run of
ten seconds and one of ten minutes, and a resumed run goes on where it was. Lengths in optimizer steps, as the
reference run has them, are the alternative. Sources: the reference run's warmdown on the clock (remaining time over
the time that `warmdown_iters` steps take) and the linear momentum warm-up that Muon runs use; 1-sqrt: Hägele et al.,
arXiv:2405.18392.
"""

import math
from typing import Literal

WarmdownShape = Literal["cosine", "linear", "sqrt"]
WARMDOWN_SHAPES: dict[str, str] = {"cosine": "½(1 + cos(π(1 − f)))", "linear": "f", "sqrt": "1 − √(1 − f)"}
# Factor of the very first step: not 0, so that a run of one step learns.
WARMUP_START = 0.1


def warmup_lr_scale(progress: float, share: float) -> float:
    """Factor in (0, 1] of the learning rates: linear from a tenth to 1 over the first `share` of the run.

    Args:
        progress: share of the run done before the step, 0 to 1.
        share: length of the warm-up as a share of the run; 0 turns it off.
    """
    if share <= 0:
        return 1.0
    return WARMUP_START + (1.0 - WARMUP_START) * min(progress / share, 1.0)


def warmdown_left(progress: float, share: float) -> float:
    """Part of the warmdown still ahead, 1 before it starts and 0 at the end of the run.

    Args:
        progress: share of the run done before the step, 0 to 1.
        share: length of the warmdown as a share of the run; 0 turns it off, and the result is 1.
    """
    if share <= 0:
        return 1.0
    return min(max((1.0 - progress) / share, 0.0), 1.0)


def warmdown_left_of_steps(
    warmdown_iters: int,
    *,
    remaining_seconds: float | None = None,
    mean_step: float | None = None,
    remaining_steps: int | None = None,
) -> float:
    """Part of a warmdown of so many optimizer steps still ahead, 0 to 1: the reference run's rule.

    `remaining_seconds / (warmdown_iters * mean_step)` on a clock, `remaining_steps / warmdown_iters` over a step limit,
    the smaller of the two when both limits exist, and never more than 1. Without any limit, or before the first step
    was timed, it is 1.

    Args:
        warmdown_iters: length of the warmdown in optimizer steps; 0 turns it off.
        remaining_seconds: usable seconds left on the clock, None without a budget.
        mean_step: mean seconds per optimizer step so far, None before the first step.
        remaining_steps: optimizer steps left, None without a step limit.
    """
    left = 1.0
    if warmdown_iters > 0:
        if remaining_seconds is not None and mean_step is not None and mean_step > 0:
            left = min(left, remaining_seconds / (warmdown_iters * mean_step))
        if remaining_steps is not None:
            left = min(left, remaining_steps / warmdown_iters)
    return max(left, 0.0)


def warmdown_lr_scale(left: float, shape: WarmdownShape = "cosine", floor: float = 0.0) -> float:
    """Factor in [floor, 1] of the learning rates.

    Args:
        left: part of the warmdown still ahead, 0 to 1.
        shape: "cosine" gives ½(1 + cos(π(1 − left))), "linear" gives left, "sqrt" gives 1 − √(1 − left).
        floor: factor at the end of the warmdown.

    Raises:
        ValueError: `shape` is unknown.
    """
    if shape == "cosine":
        scale = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    elif shape == "linear":
        scale = left
    elif shape == "sqrt":
        scale = 1.0 - math.sqrt(1.0 - left)
    else:
        raise ValueError(f"warmdown shape {shape!r} is unknown; use 'cosine', 'linear' or 'sqrt'")
    return floor + (1.0 - floor) * scale


def muon_momentum(done: float, *, start: float = 0.85, end: float = 0.95) -> float:
    """Muon's momentum: linear from `start` to `end` over its warm-up, of which the part `done` (from 0) is over."""
    f = min(done, 1.0)
    return (1.0 - f) * start + f * end
