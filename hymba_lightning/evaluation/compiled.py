"""The network's forward pass, compiled for the few kinds of calls that come again and again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState
from hymba_lightning.ops.compiling import compiled

# Each costs a compilation; what comes after them runs as it is.
MOST_KINDS = 4
# So many kinds are remembered: a stream of ever new ones repeats none.
MOST_SEEN = 32


class CompiledForward:
    """Calls `net`, compiled where the inputs (B, T) are of full length and such a call came before.

    Ends of chunks are of any length, and a compilation for each would cost more than it saves. A state's position is a
    number that is compiled in: a variable would make kernels of any length, and carried states are turned back to 0,
    so that there are few.

    Args:
        net: The network, whose weights may change in place.
        length: The T that is compiled for.
    """

    def __init__(self, net: Hymba, length: int) -> None:
        self._net, self._length = net, length
        # A function, since a module here would name every weight twice.
        self._compiled = compiled(net.forward, dynamic=False)
        self._seen: set[tuple[Any, ...]] = set()
        self._kinds: set[tuple[Any, ...]] = set()

    def __call__(self, inputs: Tensor, targets: Tensor, *, state: HymbaState | None = None, **options: Any) -> Any:
        """As `net`."""
        kind = (*inputs.shape, None if state is None else str(state.position))
        if kind in self._seen and len(self._kinds) < MOST_KINDS:
            self._kinds.add(kind)
        elif inputs.size(1) == self._length and len(self._seen) < MOST_SEEN:
            self._seen.add(kind)
        given = options if state is None else options | {"state": state}
        return (self._compiled if kind in self._kinds else self._net)(inputs, targets, **given)
