"""Lightning's conventions: loaders and optimizers of one's own, epochs, precision, checkpoints, use from Python."""

from __future__ import annotations

import json
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tiny import NET, tiny_data, tiny_module, tiny_trainer, write_data
from tiny_runs import hymba
from torch.utils.data import DataLoader, TensorDataset

from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.checkpoints import read_checkpoint
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.model import HymbaConfig
from hymba_lightning.run import Run, RunRecord
from hymba_lightning.training.module import HymbaModule


def test_overfitting_sees_the_same_batches_in_every_epoch(tmp_path):
    class Seen(pl.Callback):
        batches = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches = (*self.batches, batch.inputs.clone())

    seen = Seen()
    trainer = tiny_trainer(tmp_path, overfit_batches=2, max_steps=-1, max_epochs=3, callbacks=[seen])
    trainer.fit(tiny_module(budget_seconds=600), tiny_data(write_data(tmp_path / "data")))
    assert len(seen.batches) == 6
    for first, again in zip(seen.batches[:4], seen.batches[2:], strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_would_round_the_weights_is_refused(tmp_path, precision):
    with pytest.raises(ValueError, match=r"trainer\.precision is .*model\.runtime\.compute_dtype bfloat16"):
        tiny_trainer(tmp_path, precision=precision).fit(tiny_module(), tiny_data(write_data(tmp_path / "data")))


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(work, tmp_path):
    hymba(work, "fit", tmp_path / "run", "--trainer.callbacks+", "TQDMProgressBar", "--export.enabled", "false")
    assert TQDMProgressBar is not None


def test_overfitting_on_the_command_line_goes_on_past_the_few_batches(work, tmp_path):
    options = ["--trainer.overfit_batches", "1", "--trainer.max_steps", "3", "--export.enabled", "false"]
    hymba(work, "fit", tmp_path / "run", *options)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("option", ["--optimizer", "--lr_scheduler"])
def test_an_optimizer_of_ones_own_is_no_option(work, tmp_path, option):
    with pytest.raises((SystemExit, ValueError)):
        hymba(work, "fit", tmp_path / "run", option, "AdamW")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_module_comes_back_from_its_checkpoint(fitted):
    last = fitted / "checkpoints" / "last.ckpt"
    HymbaModule.load_from_checkpoint(last, net=HymbaConfig(**NET), runtime={"activation_checkpointing": True})
    module = HymbaModule.load_from_checkpoint(last)
    saved = read_checkpoint(fitted / "checkpoints" / "last.ckpt")["state_dict"]
    own = {name: value for name, value in module.state_dict().items() if name.startswith("net.")}
    assert all(torch.equal(value, saved[name]) for name, value in own.items())
    ids = torch.randint(300, 340, (2, 16))
    assert module(ids).shape == (2, 16, 1024)
    assert torch.equal(module(ids), module.net(ids))


def test_how_a_module_is_scored_comes_back_too(tmp_path):
    module = tiny_module(ttt=TTTConfig(mode="carried", lr=0.05), on_nan="skip", budget_seconds=9, reserve_seconds=1)
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(module, tiny_data(write_data(tmp_path / "data")))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = HymbaModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.ttt_config == module.ttt_config
    assert (again.on_nan, again.reserve_seconds, again.log_every_n_steps) == ("skip", 1, 1)


def test_a_loader_of_pairs_trains_validates_and_predicts(tmp_path):
    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    module = tiny_module()
    trainer = tiny_trainer(tmp_path, max_steps=10, callbacks=[RunSummary(plots=False)], logger=CSVLogger(tmp_path))
    trainer.fit(module, pairs, pairs)
    record = Run.of(trainer).record
    assert record.trained.tokens == 10 * 4 * 64
    assert record.trained.data is None
    loss = trainer.validate(module, pairs, verbose=False)[0]["val/loss"]
    nats = torch.cat(trainer.predict(module, pairs))
    assert nats.shape == (20, 64)
    assert float(nats.mean()) == pytest.approx(loss, rel=1e-5)
    assert torch.cat(trainer.predict(module, DataLoader(ids, batch_size=4))).shape == (20, 65, 1024)
    with pytest.raises(TypeError, match=r"pair \(inputs, targets\)"):
        trainer.validate(module, DataLoader(ids.float().unsqueeze(-1), batch_size=4), verbose=False)


@pytest.mark.parametrize(
    ("options", "steps", "ended_by"),
    [
        ({"max_epochs": 3}, 15, "epochs"),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9, "epochs"),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, "epochs"),
        ({"max_epochs": 9, "max_steps": 7}, 7, "max_steps"),
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, None, "max_time"),
    ],
    ids=["epochs", "accumulated", "limited", "steps", "time"],
)
def test_what_ends_a_loader_ends_the_run_and_its_schedule(tmp_path, options, steps, ended_by):
    scales = []

    class Scales(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scales.append(Run.of(trainer).lr_scale)

    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    trainer = tiny_trainer(tmp_path, **({"max_steps": -1, "callbacks": [RunSummary(plots=False), Scales()]} | options))
    trainer.fit(tiny_module(), pairs)
    trained = RunRecord.load(tmp_path).trained
    assert trained.ended_by == ended_by
    assert steps in (trained.steps, None)
    assert scales[0] < max(scales) == pytest.approx(1.0, abs=0.1)
    assert scales[-1] < 0.5, "the warmdown knows where the end is"


def test_a_run_that_nothing_ends_is_refused(tmp_path):
    ids = torch.arange(300, 340).repeat(40)[:1300].view(20, 65)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=4)
    for data, options in ((tiny_data(write_data(tmp_path / "data")), {"max_epochs": 3}), (pairs, {"max_epochs": -1})):
        with pytest.raises(ValueError, match=r"nothing ends this run: set model\.budget_seconds"):
            tiny_trainer(tmp_path, max_steps=-1, **options).fit(tiny_module(), data)


def test_fit_then_test_from_python_is_one_run(tmp_path):
    module, data = tiny_module(), tiny_data(write_data(tmp_path / "data"))
    trainer = tiny_trainer(tmp_path / "run", callbacks=[ExportArtifact(), RunSummary(plots=False)])
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    record = RunRecord.load(tmp_path / "run")
    assert record == Run.of(trainer).record
    Run.of(trainer).started -= 1000  # what training took is not the evaluation's time
    trainer.test(module, data, verbose=False)
    assert RunRecord.load(tmp_path / "run").tested() is None  # the artifact was not tested, the weights were
    assert [score for score in Run.of(trainer).record.scores if score.stage == "ttt"][-1].seconds < 900
    tested = [score for score in record.scores if score.stage == "ttt"]
    assert tested[0].weights == record.stages()["ema"].weights
    assert record.without_adaptation(tested[0]) == record.stages()["ema"]


def test_an_evaluations_limit_is_of_everything_it_takes(tmp_path, monkeypatch):
    """Time that passes before the first chunk is part of it."""
    module = tiny_module(ttt=TTTConfig(limit_seconds=5.0, epochs=2, freeze_blocks=0))
    trainer = tiny_trainer(tmp_path, callbacks=[RunSummary(plots=False)])
    Run.of(trainer).command_started = time.monotonic() - 4.999
    trainer.test(module, tiny_data(write_data(tmp_path / "data")), verbose=False)
    summary = json.loads((tmp_path / "test_summary.json").read_text())
    assert summary["epochs_done"] == [0, 0, 0, 0]
    assert summary["seconds"] >= 4.999
