"""How a Trainer writes and reads checkpoints: with a digest, so that damage is noticed."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO

from hymba_lightning.checkpoints import read_checkpoint, write_checkpoint


class DigestCheckpointIO(TorchCheckpointIO):
    """Give it to a Trainer as a plugin: `Trainer(plugins=[DigestCheckpointIO()])`.

    Args:
        allow_undigested: Read also checkpoints that something else wrote, with a warning.
    """

    def __init__(self, allow_undigested: bool = False) -> None:
        self.allow_undigested = allow_undigested

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: the file cannot be written; an earlier one at `path` is untouched.
        """
        write_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU without executing anything in it, whatever the other arguments say.

        Raises:
            CheckpointError: the file is damaged, has no digest, or holds more than tensors and plain values.
        """
        return read_checkpoint(path, allow_undigested=self.allow_undigested)


def use_digests(trainer: pl.Trainer) -> None:
    """Has a Trainer write and check digests, unless it was given a way of its own to write checkpoints."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DigestCheckpointIO()
