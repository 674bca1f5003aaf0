"""The batch that grows: micro-batches of each step, by the share of the run that is done."""

import pytest
from tiny_lightning import TinyData, TinyModule, make_trainer

from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.training.batch_growth import BatchGrowth


class Counts(WallClock):
    """Notes the micro-batches of every optimizer step."""

    def __init__(self):
        super().__init__()
        self.of_step = {}

    def on_train_batch_start(self, trainer, *args):
        super().on_train_batch_start(trainer, *args)
        self.of_step[trainer.global_step] = self.of_step.get(trainer.global_step, 0) + 1


def test_steps_grow_at_their_shares_of_the_run(tmp_path):
    clock = Counts()
    # Lightning steps where the number of batches so far divides: the fifth step still has two.
    make_trainer(tmp_path, max_steps=8, callbacks=[BatchGrowth([0.25, 0.5], [1, 2, 4]), clock]).fit(
        TinyModule(), TinyData()
    )
    assert list(clock.of_step.values()) == [1, 1, 2, 2, 2, 4, 4, 4]


def test_a_batch_that_cannot_grow_so_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rising shares"):
        BatchGrowth([0.5, 0.25], [1, 2, 4])
    with pytest.raises(ValueError, match="must be 2 numbers"):
        BatchGrowth([0.5], [1])
    with pytest.raises(ValueError, match="add WallClock"):
        make_trainer(tmp_path, max_steps=1, callbacks=[BatchGrowth([0.5], [1, 2])]).fit(TinyModule(), TinyData())
