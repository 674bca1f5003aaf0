"""Training steps before the clock starts, undone afterwards: compilation and autotuning cost no budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hymba_lightning.callbacks.random_state import random_states, restore_random_states
from hymba_lightning.run.run import Run
from hymba_lightning.trainer_internals import datamodule_of, gradient_sync_blocked, moved_to_device


@contextmanager
def everything_restored(pl_module: LightningModule, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Puts weights, buffers, optimizer state and random state back as they were; gradients are None afterwards.

    Tensors keep their identity, so that compiled graphs and DDP stay valid.
    """
    tensors = [*pl_module.parameters(), *pl_module.buffers()]
    saved = [t.detach().clone() for t in tensors]
    optimizer_states = [deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    randomness = random_states()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for optimizer, state in zip(optimizers, optimizer_states, strict=True):
            optimizer.zero_grad(set_to_none=True)
            optimizer.load_state_dict(state)
        pl_module.zero_grad(set_to_none=True)
        restore_random_states(randomness)


class CompileWarmup(Callback):
    """Runs `steps` optimizer steps on the first training batches before the clock starts, then undoes them exactly.

    Weights, buffers, optimizer state, random state and, because `datamodule.train_batch(i)` is a pure function, the
    data position are as if nothing had happened. Nothing is logged: the run's `warming_up` is True meanwhile, and
    `pl_module.log` does nothing. A LightningModule that keeps other state in `training_step` must heed that flag.

    Args:
        steps: optimizer steps to run; 0 runs none.

    Raises:
        ValueError: `steps` is negative.
    """

    def __init__(self, steps: int = 20) -> None:
        if steps < 0:
            raise ValueError(f"compile_warmup_steps is {steps}; it must be 0 (off) or positive, e.g. 20")
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps == 0:
            return
        if not hasattr(datamodule_of(trainer), "train_batch"):
            rank_zero_warn(
                "no warm-up steps before the clock: they need a datamodule with train_batch(i). "
                "Compilation will count as training time"
            )
            return
        rank_zero_info(f"warming up: {self.steps} steps that are undone before training starts")
        with (
            Run.of(trainer).phases.inside("warm_up"),
            everything_restored(pl_module, trainer.optimizers),
            self._unlogged(trainer, pl_module),
        ):
            for step in range(self.steps):
                self._run_step(trainer, pl_module, step)
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)

    @staticmethod
    def _run_step(trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """One optimizer step through the strategy, so that DDP's hooks and the precision plugin take part."""
        strategy, optimizer = trainer.strategy, trainer.optimizers[0]
        accumulate = trainer.accumulate_grad_batches
        data: Any = datamodule_of(trainer)
        for micro in range(accumulate):
            index = step * accumulate + micro
            batch = trainer.precision_plugin.convert_input(data.train_batch(index))
            batch = moved_to_device(trainer, pl_module, batch)
            with gradient_sync_blocked(trainer, micro < accumulate - 1):
                output = strategy.training_step(batch, index)
                loss: Any = output["loss"] if isinstance(output, dict) else output
                if loss is not None:  # a step of the user's may skip a batch
                    strategy.backward(loss / accumulate, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @staticmethod
    @contextmanager
    def _unlogged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        run = Run.of(trainer)
        run.warming_up = True
        pl_module.log = lambda *args, **kwargs: None  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            run.warming_up = False
            del pl_module.log
