"""Keeps Lightning's own handling of signals out of the way of ours."""

from __future__ import annotations

from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from hymba_lightning import signals


class NoSigtermHandler(_SignalConnector):
    """Lightning's handler of SIGTERM only makes a note, which nothing outside the training loop reads, and starts a
    collective inside the handler. SLURM's requeueing is left as it is."""

    def register_signal_handlers(self) -> None:
        if self.trainer._accelerator_connector.cluster_environment.__class__.__name__ == "SLURMEnvironment":
            super().register_signal_handlers()

    def _sigterm_notifier_fn(self, signum: int, _: FrameType) -> None:
        """What it does is done by ours."""


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Takes SIGTERM from a Trainer that has not run yet, and sends signals on to the ranks that it starts."""
    trainer._signal_connector = NoSigtermHandler(trainer)
    launcher = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        signals.pass_on_by(launcher.kill)
