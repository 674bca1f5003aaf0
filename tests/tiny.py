"""A network and a data set small enough to train within a test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.training.module import HymbaModule
from hymba_lightning.training.optim import OptimizerConfig

TOKENIZER = Path(__file__).parent / "golden" / "sp1024.model"
NET = {
    "vocab_size": 1024,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    "n_kv_heads": 1,
    "window": 16,
    "d_state": 4,
    "bigram_buckets": 64,
    "bigram_dim": 8,
    "mlp_mult": 2,
}


def lively(config: HymbaConfig) -> Hymba:
    """A network whose zero-initialised parts say something."""
    torch.manual_seed(3)
    net = Hymba(config)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def write_data(folder: Path, n_train: int = 20_000, n_val: int = 700) -> Path:
    """Shards of a language that can be learned: each id mostly follows its predecessor. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    generator = np.random.default_rng(0)
    for split, n_tokens in (("train", n_train), ("val", n_val)):
        steps = np.where(generator.random(n_tokens) < 0.9, 1, generator.integers(0, 40, n_tokens))
        tokens = 300 + np.cumsum(steps) % 40
        tokens[::500] = 1
        write_shard(folder / f"tiny_{split}_000000.bin", tokens.astype(np.uint16))
    return folder


def tiny_module(
    net: dict[str, Any] | None = None,
    runtime: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **arguments: Any,
) -> HymbaModule:
    """A module with the tiny network and the default schedule."""
    pl.seed_everything(7, verbose=False)
    arguments = {"log_every_n_steps": 1} | arguments
    return HymbaModule(
        HymbaConfig(**(NET | (net or {}))),
        RuntimeConfig(**(runtime or {})),
        OptimizerConfig(**(optimizer or {})),
        **arguments,
    )


def tiny_data(folder: Path, **arguments: Any) -> HymbaDataModule:
    """The data module of `write_data`'s folder."""
    return HymbaDataModule(str(folder), **({"seq_len": 64, "micro_batch_size": 2, "ttt_chunk_tokens": 192} | arguments))


def tiny_trainer(folder: Path, **arguments: Any) -> pl.Trainer:
    """A plain trainer on one CPU, without anything that the tests do not look at."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 12,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
    }
    return pl.Trainer(**(defaults | arguments))
