"""Refuses, before any work, options of Lightning's Trainer that would not do here what they say."""

from __future__ import annotations

import logging
import os

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)

from hymba_lightning.callbacks.wall_clock import NO_END
from hymba_lightning.data.agreement import agree
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.tokenizer import file_sha256
from hymba_lightning.run.run import Run
from hymba_lightning.trainer_internals import callbacks_of, datamodule_of, time_limit
from hymba_lightning.training.optim import HymbaOptimizer

# Callbacks of Lightning's, and what takes their place.
AVERAGE = "model.average averages the weights that are validated and exported; leave the callback out"
INSTEAD: dict[type[pl.Callback], str] = {
    WeightAveraging: AVERAGE,
    StochasticWeightAveraging: AVERAGE,
    LearningRateFinder: "model.optimizer has a rate for each kind of weights, not one; leave the callback out",
    BatchSizeFinder: "set data.micro_batch_size and trainer.accumulate_grad_batches; leave the callback out",
}
log = logging.getLogger("hymba_lightning")

# The Trainer's precisions that leave the weights float32, as the optimizer needs them.
PRECISIONS = ("32-true", "bf16-mixed")
# The module's own options that a run is made of; what a subclass keeps beside them may differ from rank to rank.
OPTIONS = ("net", "optimizer", "ttt", "budget_seconds", "average", "average_window", "ema_decay")
# What a validation measures.
MEASURED = ("val/bpb", "val/loss")


def is_endless(data: object) -> bool:
    """Whether training reads the package's shards, which have no end; a subclass may have a loader of its own."""
    own = getattr(type(data), "train_dataloader", None)
    return isinstance(data, HymbaDataModule) and own is HymbaDataModule.train_dataloader


def check_options(trainer: pl.Trainer) -> None:
    """
    Raises:
        ValueError: a precision that would round the weights, a number that cannot be, or ranks of which one was given
            another option or another checkpoint.
    """
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {trainer.precision}: leave it at 32-true; the network "
            "computes in bfloat16 with model.runtime.compute_dtype bfloat16, over float32 weights"
        )
    for option in ("accumulate_grad_batches", "gradient_clip_val"):
        value = getattr(trainer, option)
        if value is not None and not value > 0:
            raise ValueError(f"trainer.{option} is {value}; it must be positive")
    agree(lambda: _given(trainer))


def _given(trainer: pl.Trainer) -> dict[str, object]:
    """What every rank must have been given alike, by its name on the command line."""
    hparams = trainer.lightning_module.hparams
    options = {f"model.{name}": repr(hparams[name]) for name in OPTIONS if name in hparams}
    options |= {f"trainer.{name}": getattr(trainer, name) for name in ("max_steps", "accumulate_grad_batches")}
    return options | _checkpoint(Run.of(trainer).weights_from)


def _checkpoint(path: str | os.PathLike[str] | None) -> dict[str, object]:
    if path is None or not os.path.isfile(path):  # a folder, or what only a plugin can read
        return {"--ckpt_path": path is None}
    return {"--ckpt_path": file_sha256(path)}


def check_callbacks(trainer: pl.Trainer) -> None:
    """
    Raises:
        ValueError: a callback of Lightning's that does what the module does already, or cannot do it here.
    """
    for callback in callbacks_of(trainer):
        remedy = next((remedy for kind, remedy in INSTEAD.items() if isinstance(callback, kind)), None)
        if isinstance(callback, LearningRateMonitor) and not trainer.loggers:
            raise ValueError(
                "LearningRateMonitor writes to a logger, and trainer.logger is false: name one, such as CSVLogger, or "
                "leave the callback out; history.json has every step's lr_scale"
            )
        if remedy is not None:
            raise ValueError(f"{type(callback).__name__} does not go with this module: {remedy}")


def check_fit(trainer: pl.Trainer, budget_seconds: float | None, measures_more: bool) -> None:
    """Checks the Trainer's options and callbacks for a fit.

    Args:
        trainer: Whose options and callbacks are looked at.
        budget_seconds: Of the module.
        measures_more: Whether the module may log other metrics than validations do.

    Raises:
        ValueError: as the checks below do.
    """
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            "automatic_optimization is False, but warm-up, clock, average and checkpoints follow Lightning's own "
            "optimizer steps: leave it True, and return an optimizer of your own from configure_optimizers"
        )
    check_end(trainer, budget_seconds)
    check_validations(trainer)
    check_monitors(trainer, measures_more)


def check_trainable(module: pl.LightningModule) -> None:
    """Not in `setup`: a subclass may decide in its own, or make parameters in `configure_model`.

    Raises:
        ValueError: no parameter of the module would be trained.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError("nothing would be trained: requires_grad is False for every parameter of the module")


def check_start(trainer: pl.Trainer) -> None:
    """
    Raises:
        ValueError: a scheduler was configured for the module's own optimizer, whose rates follow the run's clock, or
            another rank goes on from another checkpoint.
    """
    agree(lambda: _checkpoint(trainer.ckpt_path))
    if trainer.lr_scheduler_configs and isinstance(trainer.optimizers[0], HymbaOptimizer):
        raise ValueError(
            "a learning-rate scheduler would change rates that follow the run's clock: set model.optimizer's "
            "warmup_share, warmdown_share and warmdown_shape, or return an optimizer of your own with it"
        )


def check_validations(trainer: pl.Trainer) -> None:
    """
    Raises:
        ValueError: validations after no batches, or at shares of a pass over data that have no end.
    """
    for option in ("val_check_interval", "check_val_every_n_epoch"):
        if getattr(trainer, option) == 0 and trainer.limit_val_batches:
            raise ValueError(
                f"trainer.{option} is 0: leave it out for no validation before the end of training, and set "
                "trainer.limit_val_batches to 0 for none at all"
            )
    interval, limited = trainer.val_check_interval, isinstance(trainer.limit_train_batches, int)
    share = isinstance(interval, float) and interval < 1.0
    if share and not limited and is_endless(datamodule_of(trainer)):
        raise ValueError(
            f"trainer.val_check_interval is {interval}, a share of a pass over the data, which are read without end: "
            "give a number of batches, such as 100, or a time, such as 00:00:01:00"
        )


def check_end(trainer: pl.Trainer, budget_seconds: float | None) -> None:
    """
    Raises:
        ValueError: nothing would be trained, or nothing is known that will end this fit; a loader of one's own is asked
            when it is there.
    """
    for option in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, option) == 0:
            raise ValueError(f"nothing would be trained: trainer.{option} is 0")
    timer = time_limit(trainer)
    if timer is not None and timer.time_elapsed() + (timer.time_remaining() or 0.0) <= 0:
        raise ValueError("nothing would be trained: trainer.max_time is 0 seconds")
    limited = isinstance(trainer.limit_train_batches, int)  # overfit_batches sets it
    ends = budget_seconds is not None or trainer.max_steps >= 0 or timer is not None
    endless = is_endless(datamodule_of(trainer)) and not limited
    if not ends and (endless or trainer.max_epochs == -1):
        raise ValueError(NO_END)


def check_monitors(trainer: pl.Trainer, measures_more: bool = False) -> None:
    """Refuses callbacks that monitor a value which is never logged; warns of those that wait for validations in vain.

    Args:
        trainer: Whose callbacks are looked at.
        measures_more: Whether the module may log other metrics than validations do.

    Raises:
        ValueError: a callback of Lightning's waits for a metric that nobody measures.
    """
    known = ("hymba_lightning", "lightning")
    callbacks = callbacks_of(trainer)
    if measures_more or any(type(callback).__module__.partition(".")[0] not in known for callback in callbacks):
        return
    for callback in callbacks:
        monitor, name = getattr(callback, "monitor", None), type(callback).__name__
        if monitor is None:
            continue
        if monitor not in MEASURED:
            raise ValueError(f"{name} monitors {monitor!r}, which is not measured: use {' or '.join(MEASURED)}")
        # 1.0 is a whole pass over data without end, 1 is every batch.
        interval = trainer.val_check_interval
        never = isinstance(interval, float) and not isinstance(trainer.limit_train_batches, int)
        if never and is_endless(datamodule_of(trainer)):
            log.warning(
                "%s waits for validations, of which none is made in training: set trainer.val_check_interval to a "
                "number of batches",
                name,
            )
