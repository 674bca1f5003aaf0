"""A batch that grows inside the budget: few tokens a step while any direction is good, more once noise is what limits.

Sources: Smith et al., "Don't decay the learning rate, increase the batch size" (arXiv:1711.00489).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from hymba_lightning.run.run import Run, require_clock


class BatchGrowth(pl.Callback):
    """Sets how many micro-batches make an optimizer step, by the share of the run that is done.

    A micro-batch keeps its shape, so that nothing is compiled anew. A step under way is never cut; the first after a
    change may have fewer micro-batches, since Lightning steps at multiples of the number over all batches so far.

    Args:
        shares: Rising shares of the run, in (0, 1), from which the next number holds.
        micro_batches: Numbers of micro-batches, one more than `shares`.

    Raises:
        ValueError: Numbers that cannot be, or a trainer without the run's clock.
    """

    def __init__(self, shares: list[float], micro_batches: list[int]) -> None:
        if not all(0 < share < 1 for share in shares) or sorted(set(shares)) != list(shares):
            raise ValueError(f"shares={shares} must be rising shares of the run between 0 and 1")
        if len(micro_batches) != len(shares) + 1 or min(micro_batches) < 1:
            raise ValueError(
                f"micro_batches={micro_batches} must be {len(shares) + 1} numbers of at least 1, one more than shares"
            )
        self.shares, self.micro_batches = shares, micro_batches
        self._step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if Run.of(trainer).clock is None:
            raise ValueError("BatchGrowth goes by the run's clock: add WallClock() to the trainer's callbacks")
        self._step = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        progress = require_clock(Run.of(trainer)).reading.progress
        trainer.accumulate_grad_batches = self.micro_batches[sum(progress >= share for share in self.shares)]
