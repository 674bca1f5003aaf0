"""Every use of Lightning's private interface, so that a new release needs checking in one file only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any, Union, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hymba_lightning import signals

# A loader of as many batches has no end; this package's says that it has 2^40.
ENDLESS = 1 << 39


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether the Trainer only tries its loops (`fast_dev_run`): nothing is to be written then."""
    return bool(getattr(trainer, "fast_dev_run", False))


def agree_on_rank(trainer: pl.Trainer) -> None:
    """Has Lightning's loggers and messages take the Trainer's rank, where a variable of a launcher's is left over."""
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]


def trains_elsewhere(trainer: pl.Trainer) -> bool:
    """Whether all ranks are processes that this one starts, as those of `ddp_spawn` and `ddp_fork` are."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """The Trainer's datamodule, None where it was given loaders."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks."""
    return list(getattr(trainer, "callbacks", []))


def not_yet_there(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Those of a kind that the Trainer has none of."""
    present = callbacks_of(trainer)
    return [callback for callback in callbacks if not any(isinstance(each, type(callback)) for each in present)]


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Everything that Lightning puts into a checkpoint, without writing it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


@contextmanager
def signals_not_broadcast(trainer: pl.Trainer) -> Iterator[None]:
    """Without the broadcast with which every batch of a DDP run asks the GPU for signals."""
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loop._broadcast_sigterm_tensor


def gradient_sync_blocked(trainer: pl.Trainer, block: bool) -> AbstractContextManager[None]:
    """Micro-batches that only accumulate do not reduce their gradients over the ranks."""
    return _block_parallel_sync_behavior(trainer.strategy, block=block)


def gradient_sync_wanted(trainer: pl.Trainer) -> bool:
    """Whether the micro-batch at hand is the one after which ranks share their gradients."""
    return bool(getattr(trainer.strategy.model, "require_backward_grad_sync", False))


def graph_obstacle(trainer: pl.Trainer) -> str | None:
    """What in the Trainer keeps a step from being recorded as a CUDA graph, None where nothing does."""
    if trainer.strategy.root_device.type != "cuda":
        return f"the network is on {trainer.strategy.root_device}"
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return f"the strategy is {type(trainer.strategy).__name__}, where one device or DDP is needed"
    if trainer.precision != "32-true":
        return f"trainer.precision is {trainer.precision}, where 32-true is needed"
    return None


def moved_to_device(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """A batch as the training loop hands it to `training_step`."""
    return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))


def rewind_to_accumulation_window(trainer: pl.Trainer) -> None:
    """Lets Lightning count from the first micro-batch of the accumulation window it was interrupted in.

    A checkpoint holds no half-accumulated gradient, so the window's batches are read again; the batch counter must go
    back with them, or the first optimizer step would see fewer micro-batches than the others. How many a window has,
    Lightning's scheduler only says when an epoch begins, so not to a run that goes on within one.
    """
    trainer.accumulate_grad_batches = _accumulated(trainer, trainer.current_epoch)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    surplus = progress.current.ready % trainer.accumulate_grad_batches
    progress.total.increment_by(-surplus)
    progress.current.increment_by(-surplus)
    # The fetcher ends a run of limit_train_batches; it counts the batches before the restart too.
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.fetched -= surplus


def started_ranks(trainer: pl.Trainer) -> list[Any]:
    """The processes of ranks 1, 2 … of this node, where this one has started them."""
    return getattr(trainer.strategy.launcher, "procs", [])


def when_ranks_have_met(trainer: pl.Trainer, call: Callable[[pl.Trainer], None]) -> None:
    """Has `call(trainer)` made on every rank of each fit, validation or test as soon as they can talk."""
    met = trainer.strategy.setup_environment

    def meet() -> None:
        met()
        call(trainer)

    trainer.strategy.setup_environment = meet  # type: ignore[method-assign]


def step_limit(trainer: pl.Trainer) -> int | None:
    """Optimizer steps after which `max_steps`, or `max_epochs` over so many batches, ends a fit; None for no end.

    To be asked when the loaders are there. A loader that is not to end says so by a length out of reach.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches < ENDLESS:
        # What a step takes may change at some epochs, by a callback of Lightning's.
        changes = sorted({0, *(c for c in _accumulation(trainer) if c < epochs), epochs})
        limits.append(sum(-(-int(batches) // _accumulated(trainer, a)) * (b - a) for a, b in pairwise(changes)))
    return min(limits, default=None)


def _accumulation(trainer: pl.Trainer) -> dict[int, int]:
    """Epoch → micro-batches of a step from there on, where a GradientAccumulationScheduler says so."""
    schedulers = (each for each in callbacks_of(trainer) if isinstance(each, GradientAccumulationScheduler))
    return next((scheduler.scheduling for scheduler in schedulers), {})


def _accumulated(trainer: pl.Trainer, epoch: int) -> int:
    """Micro-batches of a step in an epoch."""
    by_epoch = _accumulation(trainer)
    return by_epoch[max(start for start in by_epoch if start <= epoch)] if by_epoch else trainer.accumulate_grad_batches


def say_that_data_are_endless(trainer: pl.Trainer) -> None:
    """Progress bars show a loader of 2^40 batches as one without a length. To be called when the loaders are there."""
    if trainer.fit_loop.max_batches >= ENDLESS:
        trainer.fit_loop.max_batches = float("inf")


def is_ending(trainer: pl.Trainer) -> bool:
    """Whether the optimizer step just made is the last one."""
    return trainer.should_stop or trainer.global_step == step_limit(trainer)


def time_limit(trainer: pl.Trainer) -> Timer | None:
    """The timer of `max_time`, or one of the user's, that ends a fit; None for none."""
    timers = (callback for callback in callbacks_of(trainer) if isinstance(callback, Timer))
    return next((timer for timer in timers if timer.time_remaining() is not None), None)


def log_evaluations_by_step(trainer: pl.Trainer) -> None:
    """Sends what an evaluation logs to the loggers without the epoch, which TensorBoard would show first of all."""
    connector = trainer._logger_connector

    def log(metrics: dict[str, Any]) -> None:
        if not trainer.sanity_checking:
            connector.log_metrics(metrics, step=trainer.global_step)

    connector.log_eval_end_metrics = log  # type: ignore[method-assign]


def end_where_nothing_is_left(trainer: pl.Trainer) -> None:
    """Has `on_train_end` called for a resumed run whose steps or epochs are all done: Lightning would leave it out.

    So a run that was killed after its last step is still scored and exported when it is resumed.
    """
    loop = trainer.fit_loop
    run: Callable[[], STEP_OUTPUT | None] = loop.run

    def run_or_end() -> Any:
        loop.setup_data()
        if loop.restarting and loop.done and trainer.limit_train_batches != 0:
            del loop.run  # type: ignore[method-assign]
            return loop.on_run_end()
        del loop.run  # type: ignore[method-assign]
        return run()

    loop.run = run_or_end  # type: ignore[method-assign,assignment]


def make_folders_optional() -> None:
    """Lets the command line name a file logger without a folder: the run's is meant then.

    Lightning's file loggers want `save_dir` as their first argument, and the parser reads that from their signatures.
    """
    for logger in (CSVLogger, TensorBoardLogger):
        init: Any = logger.__init__
        parameters = inspect.signature(init).parameters
        if parameters["save_dir"].default is inspect.Parameter.empty:
            init.__defaults__ = (None, *init.__defaults__)


def read_whole_numbers_as_such() -> None:
    """Has the command line take "--trainer.limit_test_batches 1" for one batch, never for 1.0, which is all of them.

    Python keeps one object for Optional[int | float] and Optional[float | int], whichever is made first, and Lightning
    has both: what else was imported decides the order of the Trainer's, in which the parser tries them.
    """
    hints = pl.Trainer.__init__.__annotations__
    for name, hint in hints.items():
        if {int, float} <= set(get_args(hint)):
            hints[name] = Union[(int, *(each for each in get_args(hint) if each is not int))]


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
        signals.pass_on_by(launcher.kill)  # type: ignore[union-attr]
