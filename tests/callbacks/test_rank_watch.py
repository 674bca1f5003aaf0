"""The watch over ranks, where a program goes on after what it heard."""

import contextlib
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data
from tiny_lightning import run_ranks

from hymba_lightning.callbacks.rank_watch import RankWatch


class Waits(pl.Callback):
    """Fails, or takes longer than a dead rank's peers are given to end, in the first step."""

    def __init__(self, fails_after: float | None = None) -> None:
        self.fails_after = fails_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(2.5 if self.fails_after is None else self.fails_after)
        if self.fails_after is not None:
            raise ValueError("these rates diverge")


def _fit_again(rank: int, folder: Path) -> None:
    with contextlib.suppress(ValueError):
        _fit(rank, folder, Waits(fails_after=0.4 * rank))
    _fit(rank, folder, Waits())
    (folder / f"done-{rank}").touch()


def _fit(rank: int, folder: Path, callback: pl.Callback) -> None:
    trainer = tiny_trainer(
        folder / str(rank),
        callbacks=[RankWatch(grace_seconds=1.5), callback],
        max_steps=1,
        devices=2,
        strategy="ddp",
        limit_val_batches=0,
    )
    trainer.fit(tiny_module(compile_warmup_steps=0), datamodule=tiny_data(folder / "data"))


@pytest.mark.ddp
def test_ranks_that_all_fail_alike_can_fit_again(tmp_path):
    """A search over rates catches what a fit raises and goes on; no timer of that fit may end it."""
    write_data(tmp_path / "data")
    run_ranks(_fit_again, tmp_path)
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
