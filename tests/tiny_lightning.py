"""A LightningModule and a datamodule of a few hundred parameters, with the parameter names of the real network."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hymba_lightning.model.roles import Module, Role, declare, parameter
from hymba_lightning.run.run import ClockReading, Run
from hymba_lightning.training.optim import HymbaOptimizer, OptimizerConfig, build_optimizer

VOCAB, WIDTH = 16, 8


class TinyMixer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_q = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 2, groups=WIDTH)
        self.dt_proj = nn.Linear(2, WIDTH)
        self.A_log = parameter(torch.zeros(WIDTH, 3), Role.DYNAMICS)
        self.D = parameter(torch.ones(WIDTH), Role.CONTROL)
        for linear in (self.c_q, self.proj):
            declare(linear, weight=Role.MATRIX)
        declare(self.conv1d, weight=Role.CONVOLUTION, bias=Role.SCALAR)
        declare(self.dt_proj, weight=Role.DYNAMICS_MATRIX, bias=Role.DYNAMICS)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.proj(F.silu(self.c_q(x_BTD)))
        conv_BTD = self.conv1d(F.pad(x_BTD.mT, (1, 0))).mT
        dt_BTD = F.softplus(self.dt_proj(x_BTD[..., :2]))
        return self.D * conv_BTD + dt_BTD * torch.exp(-self.A_log.exp()).sum(-1)


class TinyBlock(Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TinyMixer()
        self.attn_scale = parameter(torch.ones(WIDTH), Role.CONTROL)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.attn_scale * self.attn(x_BTD)


class TinyNet(nn.Module):
    """Embedding, two blocks with dropout between, tied head; `c_q` of the first block is shared with the second."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB, WIDTH)
        declare(self.tok_emb, weight=Role.EMBEDDING)
        self.blocks = nn.ModuleList([TinyBlock(), TinyBlock()])
        self.blocks[1].attn.c_q = self.blocks[0].attn.c_q
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs_BT: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x_BTD = self.tok_emb(inputs_BT)
        for block in self.blocks:
            x_BTD = self.dropout(block(x_BTD))
        return x_BTD @ self.tok_emb.weight.T


class TinyModule(pl.LightningModule):
    """Records what the callbacks tell it."""

    def __init__(self, config: OptimizerConfig | None = None, dropout: float = 0.1, step_seconds: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = TinyNet(dropout)
        self.optimizer_config = config or OptimizerConfig(warmdown_iters=4)
        self.step_seconds = step_seconds
        self.readings: list[ClockReading] = []
        self.losses: list[float] = []
        self.val_weights: list[Tensor] = []
        self.test_weights: list[Tensor] = []

    def configure_optimizers(self) -> HymbaOptimizer:
        return build_optimizer(self.net, self.optimizer_config)

    def setup(self, stage: str) -> None:
        Run.of(self.trainer).schedules = [self.on_clock]

    @property
    def warming_up(self) -> bool:
        return Run.of(self.trainer).warming_up

    def on_clock(self, reading: ClockReading) -> None:
        self.readings.append(reading)
        config = self.optimizer_config
        self.trainer.optimizers[0].set_schedule(config.lr_scale(reading), config.momentum(reading))

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.step_seconds:
            time.sleep(self.step_seconds)
        loss = self.loss(batch)
        self.log("train/loss", loss)
        if not self.warming_up:
            self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.val_weights.append(self.net.tok_emb.weight.detach().clone())
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.test_weights.append(self.net.tok_emb.weight.detach().clone())

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}


def make_batch(index: int) -> Tensor:
    """(4, 7) token ids: a pure function of the index."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(VOCAB, (4, 7), generator=generator)


class Batches(Dataset):
    def __init__(self, start: int, n: int) -> None:
        self.start, self.n = start, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return make_batch(self.start + index)


class TinyData(pl.LightningDataModule):
    """Batch i of the run is `make_batch(i)`, whether the run was resumed or not."""

    def __init__(self, val_batches: int = 2) -> None:
        super().__init__()
        self.position = 0
        self.val_batches = val_batches

    def train_batch(self, index: int) -> Tensor:
        return make_batch(index)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self.position, 10_000), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Batches(50_000, self.val_batches), batch_size=None)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Batches(60_000, 1), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.trainer.fit_loop.epoch_loop.batch_progress.total.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def make_trainer(folder: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A CPU Trainer without bars, logs and, unless asked for, validation."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callbacks, **(defaults | options))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit, names included."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAt(pl.Callback):
    """Ends training after an optimizer step, as a budget would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class FakeTime:
    """Seconds that pass only when told to; its `advance` stands in for work."""

    def __init__(self, now: float = 0.0, speed: float = 1.0) -> None:
        self.now, self.speed = now, speed

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds * self.speed


class TimedModule(TinyModule):
    """Every micro-batch takes `durations[i]` fake seconds (the last one repeats), every validation batch 100."""

    def __init__(self, fake_time: FakeTime, durations: list[float], config: OptimizerConfig | None = None) -> None:
        super().__init__(config)
        self.fake_time, self.durations = fake_time, durations
        self.micro_batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.fake_time.advance(self.durations[min(self.micro_batches, len(self.durations) - 1)])
        self.micro_batches += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.fake_time.advance(100.0)


def _run_rank(rank: int, world_size: int, port: int, function: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    values |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in values.items()})
    function(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_ranks(function: Any, *arguments: Any, world_size: int = 2) -> None:
    """Call `function(rank, *arguments)` in processes set up as torchrun would; Trainers inside use gloo.

    Forked, because importing everything once more per process takes longer than the tests themselves; safe as long as
    torch runs one thread. Not where there is a GPU, whose driver does not survive a fork.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    method = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(_run_rank, args=(world_size, port, function, arguments), nprocs=world_size, start_method=method)
