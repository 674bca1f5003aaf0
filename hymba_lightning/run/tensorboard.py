"""What only TensorBoard shows: pictures, and the hyper-parameters beside the final scores."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from torch.utils.tensorboard.summary import hparams

from hymba_lightning.run.record import RunRecord
from hymba_lightning.trainer_internals import datamodule_of

# TensorBoard orders groups by name: these stand after train/ and val/, of which they are the last word.
FINAL, TEST = "val_final/", "val_ttt/"


def log_final_scores(trainer: pl.Trainer, module: pl.LightningModule, record: RunRecord) -> None:
    """Fills the HParams tab: options of module and data, and the final scores, which are logged as scalars besides.

    A later test's score, under ttt_bpb, takes its place there too.
    """
    if not record.stages():
        return
    data = datamodule_of(trainer)
    given = dict(module.hparams) | {name: getattr(data, name, None) for name in ("seq_len", "micro_batch_size")}
    given |= {"world_size": trainer.world_size, "accumulate_grad_batches": trainer.accumulate_grad_batches}
    options = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in _flat(given).items()
        if value is not None
    }
    scores = {f"{FINAL}{stage}_bpb": score.bpb for stage, score in record.stages().items()}
    for logger in _loggers(trainer):
        for summary in hparams(options, scores | {f"{FINAL}ttt_bpb": 0.0}):
            # SummaryWriter.add_hparams would open a run of its own for them.
            logger.experiment._get_file_writer().add_summary(summary)


def log_picture(trainer: pl.Trainer, name: str, path: Path | None) -> None:
    """Shows a PNG file, where there is one."""
    if path is None:
        return
    pixels = np.round(imread(path)[..., :3] * 255).astype(np.uint8)
    for logger in _loggers(trainer):
        logger.experiment.add_image(f"{name}/{path.stem}", pixels, dataformats="HWC")


def _loggers(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
