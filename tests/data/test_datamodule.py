"""The datamodule under a real Trainer: what it refuses, what it serves, and that a resumed run misses nothing."""

import logging
import shutil
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.data.shard_writing import write_shard
from hymba_lightning.data.shards import ShardError
from hymba_lightning.data.token_bytes import TokenBytes

TOKENIZER = Path(__file__).parents[1] / "golden" / "sp1024.model"
SEQ_LEN = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training tokens 0 … 999 in two shards and validation tokens 0 … 99: every token is its own position."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_shard(folder / "x_train_000000.bin", np.arange(600))
    write_shard(folder / "x_train_000001.bin", np.arange(600, 1000))
    write_shard(folder / "x_val_000000.bin", np.arange(100))
    return folder


def _data(folder: Path, **arguments: Any) -> HymbaDataModule:
    return HymbaDataModule(str(folder), **({"seq_len": SEQ_LEN, "micro_batch_size": 2} | arguments))


class Recorder(pl.LightningModule):
    """A parameter trained with momentum, so that its value tells the order of the batches; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(SEQ_LEN))
        self.trained: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append(int(batch.inputs[0, 0]))
        return (self.weight * batch.inputs / 1000).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch.targets.flatten().tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class SaveAt(pl.Callback):
    """Saves after so many micro-batches."""

    def __init__(self, path: Path, micro_batches: int) -> None:
        self.path, self.micro_batches = path, micro_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.micro_batches:
            trainer.save_checkpoint(self.path)


def _trainer(max_steps: int, **arguments: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
                "enable_model_summary": False, "check_val_every_n_epoch": None, "devices": 1}  # fmt: skip
    return pl.Trainer(max_steps=max_steps, **(defaults | arguments))


def _firsts(start: int, stop: int) -> list[int]:
    """First tokens of the batches of micro-steps start … stop-1 of one rank with two spans each."""
    return [16 * step % 1000 for step in range(start, stop)]


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "saved_at"), [(1, 1), (1, 4), (3, 6), (3, 7), (3, 8), (3, 2)])
def test_resumed_run_reads_on_exactly_and_ends_bit_identical(folder, tmp_path, accumulate: int, saved_at: int) -> None:
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 4}
    whole = Recorder()
    _trainer(5, callbacks=[SaveAt(tmp_path / "c.ckpt", saved_at)], **options).fit(whole, datamodule=_data(folder))
    assert whole.trained == _firsts(0, 5 * accumulate)

    resumed, data = Recorder(), _data(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer = _trainer(5, **options)
        trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "c.ckpt", weights_only=False)
    # Inside an accumulation window the window is read again: its gradients were in no checkpoint.
    assert resumed.trained == _firsts(saved_at // accumulate * accumulate, 5 * accumulate)
    assert torch.equal(resumed.weight, whole.weight)
    assert trainer.fit_loop.total_batch_idx + 1 == 5 * accumulate
    assert data.state_dict()["spans"] == 5 * accumulate * 2


def test_epochs_of_limited_length_follow_each_other(folder: Path, tmp_path: Path) -> None:
    """A partial window at an epoch's end makes an optimizer step in Lightning; nothing is skipped or repeated."""
    options = {"accumulate_grad_batches": 3, "limit_train_batches": 7, "max_epochs": 3, "limit_val_batches": 0}
    whole = Recorder()
    _trainer(-1, callbacks=[SaveAt(tmp_path / "c.ckpt", 11)], **options).fit(whole, datamodule=_data(folder))
    assert whole.trained == _firsts(0, 21)
    resumed = Recorder()
    _trainer(-1, **options).fit(resumed, datamodule=_data(folder), ckpt_path=tmp_path / "c.ckpt", weights_only=False)
    assert resumed.trained == _firsts(10, 21)
    assert torch.equal(resumed.weight, whole.weight)


def test_fitting_on_goes_on_reading_and_a_new_run_starts_anew(folder: Path) -> None:
    data, model = _data(folder), Recorder()
    trainer = _trainer(3, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(model, datamodule=data)
    assert model.trained == _firsts(0, 5)
    again = Recorder()
    _trainer(2, limit_val_batches=0).fit(again, datamodule=data)
    assert again.trained == _firsts(0, 2)


def test_position_carries_over_to_another_batch_size_and_sequence_length(folder: Path) -> None:
    data = _data(folder)
    model = Recorder()
    _trainer(3, limit_val_batches=0).fit(model, datamodule=data)
    state = data.state_dict()
    assert (state["spans"], state["seq_len"]) == (6, SEQ_LEN)

    other = _data(folder, micro_batch_size=5)
    other.load_state_dict(state)
    assert next(iter(other.train_dataloader())).inputs[0, 0] == 6 * 8

    longer = _data(folder, seq_len=9)
    longer.load_state_dict(state)
    # 48 tokens were read; the first span of 10 that holds none of them is number 5.
    assert next(iter(longer.train_dataloader())).inputs[0, 0] == 50


# What is served -------------------------------------------------------------------------------------------------------


def test_train_batch_is_what_the_loader_gives_and_moves_nothing(folder: Path) -> None:
    data = _data(folder)
    batches = list(islice(data.train_dataloader(), 70))
    for step in (0, 5, 62, 69):
        assert torch.equal(data.train_batch(step).inputs, batches[step].inputs)
    assert next(iter(data.train_dataloader())).inputs[0, 0] == 0
    assert [data.train_spans.locate(span) for span in (74, 75)] == [
        (folder / "x_train_000000.bin", 592),
        (folder / "x_train_000001.bin", 0),
    ]


def test_shuffled_loader_depends_on_the_seed_only(folder: Path) -> None:
    first, again, other = (
        [batch.inputs[0, 0].item() for batch in islice(_data(folder, shuffle_seed=seed).train_dataloader(), 20)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_validation_scores_every_token_once(folder: Path) -> None:
    model = Recorder()
    _trainer(1).validate(model, datamodule=_data(folder), verbose=False)
    assert model.validated == list(range(1, 100))


def test_limit_scores_exactly_so_many_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = Recorder(), _data(folder, val_tokens_limit=20, ttt_chunk_tokens=8)
    with caplog.at_level(logging.INFO, logger="hymba_lightning"):
        _trainer(1).validate(model, datamodule=data, verbose=False)
    assert model.validated == list(range(1, 21))
    assert "first 20 tokens only" in caplog.text
    assert [len(chunk.tokens) - 1 for chunk in data.test_dataloader()] == [8, 8, 4]
    assert data.val_stream().n_tokens == 21


def test_validation_knows_each_targets_bytes(folder: Path) -> None:
    table = TokenBytes.from_model(TOKENIZER)
    for batch in _data(folder).val_dataloader():
        assert batch.target_bytes.numpy().tolist() == table.count(batch.inputs, batch.targets).tolist()
        assert batch.target_bytes.dtype == torch.int16


def test_calibration_batches_are_spread_and_repeatable(folder: Path) -> None:
    data = _data(folder)
    firsts = [batch.inputs[0, 0].item() for batch in data.calibration_batches(4)]
    assert firsts == [0, 15 * 16, 31 * 16, 46 * 16]
    assert firsts == [batch.inputs[0, 0].item() for batch in data.calibration_batches(4)]


def test_attributes_that_need_no_shards(tmp_path: Path) -> None:
    data = HymbaDataModule(str(tmp_path), tokenizer=str(TOKENIZER))
    assert (data.vocab_size, data.bos_id, data.token_bytes.vocab_size) == (1024, 1, 1024)
    assert len(data.tokenizer_fingerprint()) == 64
    assert data.unigram_bpb is None


def test_shards_and_tokenizer_elsewhere(folder: Path, tmp_path: Path) -> None:
    data = HymbaDataModule(
        str(tmp_path), str(TOKENIZER), str(folder / "x_train_*"), str(folder / "x_val_*"), SEQ_LEN, 1
    )
    data.setup("fit")
    assert data.train_spans.stream.n_tokens == 1000


def test_failure_of_the_reading_thread_reaches_training(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "data")
    data = _data(copy)
    batches = iter(data.train_dataloader())
    next(batches)
    (copy / "x_train_000001.bin").unlink()
    with pytest.raises(ShardError, match=r"x_train_000001\.bin"):
        list(islice(batches, 100))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, r"data\.seq_len is 0"),
        ({"micro_batch_size": -1}, r"data\.micro_batch_size is -1"),
        ({"val_tokens_limit": 0}, r"data\.val_tokens_limit is 0"),
        ({"prefetch_batches": 0}, r"data\.prefetch_batches is 0"),
        ({"shuffle_seed": -3}, r"data\.shuffle_seed is -3"),
    ],
)
def test_impossible_numbers_are_refused_at_once(folder: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _data(folder, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_len": 1000}, ValueError, r"data\.seq_len=1000 needs at least 1,001 training tokens.*hold 1,000; lower"),
        ({"train_files": "*_trian_*"}, FileNotFoundError, r"no shard matches .*_trian_.*hymba prepare"),
        ({"tokenizer": "/nowhere/t.model"}, FileNotFoundError, r"no tokenizer at /nowhere/t\.model.*data\.tokenizer"),
        (
            {"tokenizer": "{folder}"},
            IsADirectoryError,
            r"a tokenizer's file is needed .did you mean .*/tokenizer\.model",
        ),
        ({"train_files": "*.bin"}, ValueError, r"x_val_000000\.bin matches data\.train_files='\*\.bin' and"),
    ],
)
def test_impossible_data_are_refused_before_any_work(folder, arguments, error, message: str) -> None:
    arguments = {
        name: str(value).format(folder=folder) if name == "tokenizer" else value for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        _trainer(1).fit(Recorder(), datamodule=_data(folder, **arguments))


def test_ids_beyond_the_tokenizers_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "data")
    write_shard(copy / "x_val_000000.bin", np.array([1, 1024, 3]))
    with pytest.raises(ShardError, match=r"x_val_000000\.bin: token 1 has id 1024, but the tokenizer has only 1024"):
        _data(copy).setup("validate")


def test_a_validation_text_without_a_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "data")
    write_shard(copy / "x_val_000000.bin", np.array([1, 1, 1, 301]))
    _data(copy).setup("validate")
    with pytest.raises(
        ValueError, match=r"the 2 validation tokens .* stand for 0 bytes .* raise data\.val_tokens_limit"
    ):
        _data(copy, val_tokens_limit=2).setup("validate")


def test_training_shards_are_not_needed_for_a_test(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "data")
    for path in copy.glob("*_train_*"):
        path.unlink()
    _data(copy).setup("test")
    with pytest.raises(FileNotFoundError):
        _data(copy).setup("fit")


def test_settings_changed_between_two_runs_hold_for_the_next(folder: Path) -> None:
    data = _data(folder)
    _trainer(1, limit_val_batches=0).fit(Recorder(), datamodule=data)
    data.seq_len, data.val_tokens_limit = 3, 20
    data.setup("fit")
    assert next(iter(data.train_dataloader())).inputs.shape == (2, 3)
    assert sum(batch.targets.numel() for batch in data.val_dataloader()) == 20
    data.micro_batch_size = 0
    with pytest.raises(ValueError, match=r"data\.micro_batch_size is 0"):
        data.setup("fit")
