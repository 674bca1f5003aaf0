"""Which of several ways to store each tensor: least loss within a number of bytes, by Lagrangian relaxation.

Every tensor has options of some loss and some bytes. At a price λ of a byte the best choice is each tensor's least
loss + λ bytes, and what those choices are as λ falls is a walk along the tensors' lower convex hulls, steepest step
first. At each of its stops no choice of as few bytes has less loss (Everett 1963).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a tensor."""

    loss: float  # that it adds, in any unit
    bytes: float
    storage: str  # 'int', 'float16' or 'float32'
    factor: float = 1.0  # on the tensor's steps, for 'int'


def allocate(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """An option for each tensor, at most `budget` bytes together where that is possible, else the smallest ones.

    The walk along the hulls; what is left when its next step does not fit goes to the steps after it that do.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bytes for hull in hulls.values())
    queue = [(-gain(hull, 0), index, name) for index, (name, hull) in enumerate(sorted(hulls.items())) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, index, name = heapq.heappop(queue)
        hull, at = hulls[name], position[name]
        cost = hull[at + 1].bytes - hull[at].bytes
        if cost > left:
            continue  # nor would any later step of this tensor, which starts from here
        left -= cost
        position[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (-gain(hull, at + 1), index, name))
    return {name: hull[position[name]] for name, hull in hulls.items()}


def gain(hull: list[Option], at: int) -> float:
    """Loss saved per byte by the step after position `at`."""
    return (hull[at].loss - hull[at + 1].loss) / (hull[at + 1].bytes - hull[at].bytes)


def lower_hull(options: list[Option]) -> list[Option]:
    """The options that are best for some price of a byte, smallest first; their gains per byte fall strictly."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        if hull and option.bytes == hull[-1].bytes:
            continue
        while len(hull) > 1 and gain([hull[-1], option], 0) >= gain(hull, len(hull) - 2):
            hull.pop()
        hull.append(option)
    return hull
