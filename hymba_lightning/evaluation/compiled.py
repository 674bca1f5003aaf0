"""The network's forward pass, compiled for the few shapes that come again and again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hymba_lightning.model import Hymba
from hymba_lightning.ops.compiling import compiled

# Each costs a compilation; what comes after them runs as it is.
MOST_SHAPES = 4


class CompiledForward:
    """Calls `net`, compiled where the inputs (B, T) are of full length.

    Ends of chunks are of any length, and a compilation for each would cost more than it saves.

    Args:
        net: The network, whose weights may change in place.
        length: The T that is compiled for.
        positions: The state's position, a number, differs from call to call: it is compiled as a variable.
    """

    def __init__(self, net: Hymba, length: int, *, positions: bool) -> None:
        self._net, self._length = net, length
        # A function, since a module here would name every weight twice.
        self._compiled = compiled(net.forward, dynamic=None if positions else False)
        self._shapes: set[tuple[int, ...]] = set()

    def __call__(self, inputs: Tensor, targets: Tensor, **options: Any) -> Any:
        """As `net`."""
        shape = tuple(inputs.shape)
        if shape[1] == self._length and len(self._shapes) < MOST_SHAPES:
            self._shapes.add(shape)
        return (self._compiled if shape in self._shapes else self._net)(inputs, targets, **options)
