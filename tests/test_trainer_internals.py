"""Lightning's private names that are relied on: each still there, and doing what it is used for."""

import inspect
import signal
from typing import Union, get_args

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning import trainer_internals as internals
from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Inside(pl.Callback):
    """Calls look(trainer, module) after the second step."""

    def __init__(self, look):
        self.look, self.found = look, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.found = self.look(trainer, pl_module)


def seen_inside(folder, tmp_path, look, **options):
    inside = Inside(look)
    tiny_trainer(tmp_path, max_steps=3, callbacks=[inside], **options).fit(tiny_module(), tiny_data(folder))
    return inside.found


def test_a_dumped_checkpoint_has_everything_to_go_on_from(folder, tmp_path):
    found = seen_inside(folder, tmp_path, lambda trainer, module: internals.dump_checkpoint(trainer))
    assert found["global_step"] == 2
    assert {"state_dict", "optimizer_states", "callbacks", "loops", "HymbaDataModule"} <= set(found)


def test_the_broadcast_of_signals_is_there_and_comes_back(folder, tmp_path):
    def look(trainer, module):
        loop = trainer.fit_loop.epoch_loop
        before = loop._broadcast_sigterm_tensor
        with internals.signals_not_broadcast(trainer):
            inside = loop._broadcast_sigterm_tensor
        return before, inside, loop._broadcast_sigterm_tensor

    before, inside, after = seen_inside(folder, tmp_path, look)
    assert before == after != inside


def test_evaluations_are_logged_without_the_epoch(folder, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = tiny_trainer(tmp_path, max_steps=2, val_check_interval=2, logger=logger, num_sanity_val_steps=1)
    module, data = tiny_module(), tiny_data(folder)
    trainer.fit(module, data)
    results = [trainer.validate(module, data, verbose=False)[0], trainer.test(module, data, verbose=False)[0]]
    assert [set(result) for result in results] == [{"val/bpb", "val/loss"}, {"val_ttt/bpb", "val_ttt/loss"}]
    logger.save()
    names = set((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(","))
    assert {"val/bpb", "val_ttt/bpb", "train/loss"} <= names
    assert "epoch" not in names


def test_a_batch_is_moved_and_gradients_flow_inside_a_block(folder, tmp_path):
    def look(trainer, module):
        batch = internals.moved_to_device(trainer, module, trainer.datamodule.train_batch(0))
        with internals.gradient_sync_blocked(trainer, True):
            loss = module.net(batch.inputs, batch.targets)
        return batch.inputs.device, bool(torch.isfinite(loss))

    assert seen_inside(folder, tmp_path, look) == (torch.device("cpu"), True)


def test_the_counters_of_a_cut_accumulation_window_go_back(folder, tmp_path):
    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:  # the second batch of the second window
                progress = trainer.fit_loop.epoch_loop.batch_progress
                before = progress.current.ready, progress.total.ready, trainer.fit_loop._data_fetcher.fetched
                internals.rewind_to_accumulation_window(trainer)
                after = progress.current.ready, progress.total.ready, trainer.fit_loop._data_fetcher.fetched
                self.moved = [b - a for b, a in zip(before, after, strict=True)]
                progress.current.increment_by(1)
                trainer.should_stop = True

    cut = Cut()
    tiny_trainer(tmp_path, max_steps=4, accumulate_grad_batches=3, callbacks=[cut]).fit(
        tiny_module(), tiny_data(folder)
    )
    assert cut.moved == [1, 1, 1]


def test_a_resumed_run_with_nothing_left_ends_once(folder, tmp_path):
    class Ends(pl.Callback):
        ends = 0

        def on_train_end(self, trainer, pl_module):
            self.ends += 1

    save = TrainingCheckpoint(str(tmp_path / "c"), every_n_seconds=None)
    tiny_trainer(tmp_path, max_steps=3, enable_checkpointing=True, callbacks=[save]).fit(
        tiny_module(), tiny_data(folder)
    )
    ends = Ends()
    trainer = tiny_trainer(tmp_path, max_steps=3, callbacks=[ends])
    trainer.fit(tiny_module(), tiny_data(folder), ckpt_path=tmp_path / "c" / "last.ckpt")
    assert ends.ends == 0  # what Lightning does
    internals.end_where_nothing_is_left(trainer)
    trainer.fit(tiny_module(), tiny_data(folder), ckpt_path=tmp_path / "c" / "last.ckpt")
    assert ends.ends == 1
    trainer = tiny_trainer(tmp_path, max_steps=5, callbacks=[ends])
    internals.end_where_nothing_is_left(trainer)
    trainer.fit(tiny_module(), tiny_data(folder), ckpt_path=tmp_path / "c" / "last.ckpt")
    assert (ends.ends, trainer.global_step) == (2, 5)


def test_file_loggers_may_be_named_without_a_folder():
    for _ in range(2):
        internals.make_folders_optional()
    for logger in (CSVLogger, TensorBoardLogger):
        parameters = inspect.signature(logger.__init__).parameters
        assert parameters["save_dir"].default is None
        assert parameters["name"].default == "lightning_logs"


def test_a_whole_number_of_batches_stays_one_whatever_was_imported_before(monkeypatch, capsys):
    hints = pl.Trainer.__init__.__annotations__
    for name in [name for name, hint in hints.items() if {int, float} <= set(get_args(hint))]:
        monkeypatch.setitem(hints, name, Union[float, int, None])  # noqa: UP007
    given = ["--trainer.limit_test_batches", "1", "--trainer.limit_val_batches", "0.5"]
    with pytest.raises(SystemExit):
        run(["test", "--config", "demo.yaml", *given, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["limit_test_batches"], trainer["limit_val_batches"]) == (1, 0.5)
    assert isinstance(trainer["limit_test_batches"], int)


def test_lightning_leaves_sigterm_alone(folder, tmp_path):
    def look(trainer, module):
        return signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    inside = Inside(look)
    trainer = tiny_trainer(tmp_path, max_steps=3, callbacks=[inside])
    internals.leave_signals_to_us(trainer)
    trainer.fit(tiny_module(), tiny_data(folder))
    assert inside.found == before
