"""Two ranks under a plain Trainer that would inject DistributedSamplers: disjoint training, unrepeated validation."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.shard_writing import write_shard

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_shard(folder / "x_train_000000.bin", np.arange(1000))
    write_shard(folder / "x_val_000000.bin", np.arange(100))
    return folder


class RankRecorder(pl.LightningModule):
    """Writes what each rank was given to {out}/{what}_{rank}.npy. Its buffer makes DDP synchronise in every forward."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out
        self.weight = torch.nn.Parameter(torch.ones(7))
        self.register_buffer("table", torch.ones(7))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "val_steps": []}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen["train"] += batch.inputs.flatten().tolist() + batch.targets[:, -1].tolist()
        return (self.weight * batch.inputs[:, :7] / 1000).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"] += batch.targets.flatten().tolist()
        self.seen["val_steps"].append(batch_idx)

    def test_step(self, chunk: Any, batch_idx: int) -> None:
        self.seen["test"] += chunk.tokens[1:].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)

    def write(self) -> None:
        for what, tokens in self.seen.items():
            np.save(self.out / f"{what}_{self.global_rank}.npy", np.array(tokens))

    def on_fit_end(self) -> None:
        self.write()

    def on_test_end(self) -> None:
        self.write()


def _trainer(**arguments: Any) -> pl.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=timedelta(seconds=60))
    return pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, use_distributed_sampler=True, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, **arguments,
    )  # fmt: skip


def _seen(folder: Path, what: str) -> list[list[int]]:
    return [np.load(folder / f"{what}_{rank}.npy").tolist() for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("seq_len", "batch_size"),
    [
        pytest.param(7, 2, id="8 batches, 4 each"),
        pytest.param(20, 1, id="5 batches, 3 and 2"),
        pytest.param(99, 4, id="1 batch, none for the other"),
    ],
)
def test_fit_shares_out_training_and_validation(folder: Path, tmp_path: Path, seq_len: int, batch_size: int) -> None:
    data = HymbaDataModule(str(folder), seq_len=seq_len, micro_batch_size=1, val_micro_batch_size=batch_size)
    model = RankRecorder(tmp_path)
    _trainer(max_steps=3, val_check_interval=3).fit(model, datamodule=data)
    train, val = _seen(tmp_path, "train"), _seen(tmp_path, "val")
    assert not set(train[0]) & set(train[1])
    assert sorted(train[0] + train[1]) == list(range(3 * 2 * (seq_len + 1)))
    assert sorted(val[0] + val[1]) == list(range(1, 100))
    assert len(set(map(tuple, _seen(tmp_path, "val_steps")))) == 1


@pytest.mark.ddp
def test_every_rank_tests_every_chunk(folder: Path, tmp_path: Path) -> None:
    data = HymbaDataModule(str(folder), seq_len=7, micro_batch_size=1, ttt_chunk_tokens=30)
    _trainer().test(RankRecorder(tmp_path), datamodule=data, verbose=False)
    assert _seen(tmp_path, "test") == [list(range(1, 100))] * 2


@pytest.mark.ddp
def test_checkpoint_of_two_ranks_goes_on_with_one(folder: Path, tmp_path: Path) -> None:
    data = HymbaDataModule(str(folder), seq_len=7, micro_batch_size=2)
    trainer = _trainer(max_steps=3, limit_val_batches=0, callbacks=[Save(tmp_path / "c.ckpt")])
    trainer.fit(RankRecorder(tmp_path), datamodule=data)
    state = torch.load(tmp_path / "c.ckpt", weights_only=False)["HymbaDataModule"]
    assert (state["spans"], state["seq_len"]) == (2 * 2 * 2, 7)
    single = HymbaDataModule(str(folder), seq_len=7, micro_batch_size=3)
    single.load_state_dict(state)
    assert next(iter(single.train_dataloader())).inputs[:, 0].tolist() == [64, 72, 80]


class Save(pl.Callback):
    """Saves after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
