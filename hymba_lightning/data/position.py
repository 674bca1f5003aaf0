"""How far training has read: the part of a checkpoint that makes a resumed run go on with the next unread span."""

from __future__ import annotations


class ReadPosition:
    """Spans that finished optimizer steps have used, counted over all ranks.

    Batches that were handed out but whose optimizer step has not happened (read ahead, or in the middle of gradient
    accumulation) do not count: their gradients are in no checkpoint, so a resumed run reads them again.
    """

    def __init__(self) -> None:
        self._delivered = 0
        self._committed = 0
        self._step: int | None = None

    def restart(self, spans: int) -> None:
        """Go on from `spans`, whatever was read before."""
        self._delivered = self._committed = spans
        self._step = None

    def deliver(self, n_spans: int, step: int) -> None:
        """Note that a batch of `n_spans` spans (over all ranks) goes to training after `step` optimizer steps."""
        self._committed = self.spans(step)
        self._step = step
        self._delivered += n_spans

    def spans(self, step: int) -> int:
        """Spans used up by the first `step` optimizer steps, `step` being the present count."""
        return self._committed if step == self._step else self._delivered
