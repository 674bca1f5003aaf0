"""Calibration for the export: what rounding has to know, from as many training batches as fit into the budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor

from hymba_lightning.evaluation.score import sum_over_ranks
from hymba_lightning.model import Hymba
from hymba_lightning.quantization import QuantizationConfig
from hymba_lightning.quantization.schemes import Calibration, calibrate, look
from hymba_lightning.run.run import Clock, Run, require_clock
from hymba_lightning.trainer_internals import datamodule_of

if TYPE_CHECKING:
    from hymba_lightning.data.datamodule import HymbaDataModule

log = logging.getLogger("hymba_lightning")

# Times the slowest batch so far, that another one must have: the rest is for adding up over the ranks and copying.
MARGIN = 1.5


def calibrate_in_time(
    net: Hymba, config: QuantizationConfig, batches: Iterable[Tensor], clock: Clock
) -> tuple[Calibration, int]:
    """The mean of `calibrate` over all ranks' `batches` of token ids (B, T), and over how many: on each rank at least
    one, and no more than end inside the budget of the running `clock`."""
    total: Calibration | None = None
    done, slowest = 0, 0.0
    began = clock.elapsed()
    for batch in batches:
        budget = clock.budget_seconds
        if total is not None and budget is not None and clock.elapsed() + MARGIN * slowest > budget:
            break
        found = look(net, config, [batch], seed=done)
        if total is None:
            total = found
        else:
            for added, tensor in zip(total.tensors(), found.tensors(), strict=True):
                added.add_(tensor)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        done, slowest, began = done + 1, max(slowest, clock.elapsed() - began), clock.elapsed()
    if total is None:
        raise ValueError("there is no training batch to calibrate on")
    # Ranks may have had time for unlike numbers of batches.
    done = int(sum_over_ranks(torch.tensor(done, device=batch.device)))
    for tensor in total.tensors():
        sum_over_ranks(tensor).div_(done)
    return total.with_prior(done * batch.numel()), done


def rehearse(trainer: pl.Trainer, module: pl.LightningModule, config: QuantizationConfig, n_batches: int) -> None:
    """Calibrates on random ids, to no effect, before the clock starts: what that compiles would not fit into the
    reserve. Tells where the reserve is too short for all `n_batches`, and lengthens one that is too short for any."""
    log.info("calibrating on random ids before the clock starts, to compile what that takes")
    data: HymbaDataModule = datamodule_of(trainer)  # type: ignore[assignment]
    net: Hymba = module.net  # type: ignore[assignment]
    ids = torch.randint(
        net.config.vocab_size, (data.micro_batch_size, data.seq_len), generator=torch.Generator().manual_seed(0)
    ).to(module.device)
    seconds = 0.0
    for _ in range(2):  # the second time nothing is left to compile
        started = time.monotonic()
        calibrate(net, config, [ids])
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        seconds = time.monotonic() - started
    clock = require_clock(Run.of(trainer))
    if clock.budget_seconds is None:
        return
    # One number for all ranks, which must stop at the same step.
    seconds = trainer.strategy.broadcast(seconds)
    share, given = -(-n_batches // trainer.world_size), clock.reserve_seconds
    fits = 1 + int((given - MARGIN * seconds) // seconds) if given >= MARGIN * seconds else 0
    if not fits:
        clock.reserve_seconds = min(MARGIN * seconds, clock.budget_seconds / 2)
    if fits < share and trainer.is_global_zero:
        log.warning(
            "model.reserve_seconds holds back %.1f s of the budget%s, and calibrating on a batch takes about %.2f s: "
            "some %d of %d batches will be used; raise it for more",
            given,
            "" if fits else f", {clock.reserve_seconds:.1f} s from now on",
            seconds,
            max(fits, 1) * trainer.world_size,
            share * trainer.world_size,
        )
