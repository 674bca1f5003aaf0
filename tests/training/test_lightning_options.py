"""What users of Lightning bring along: optimizers, schedulers, callbacks, intervals, loaders of their own."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from tiny import NET, tiny_data, tiny_module, tiny_trainer, write_data
from torch.utils.data import DataLoader, TensorDataset

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.model import HymbaConfig
from hymba_lightning.run import Run
from hymba_lightning.training.module import HymbaModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class OwnOptimizer(HymbaModule):
    """As users write it: a subclass with options, an optimizer, a scheduler and a metric of its own."""

    def __init__(self, extra: int = 3, **options: object) -> None:
        super().__init__(**options)
        self.extra = extra
        self.save_hyperparameters("extra")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss.detach())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_subclass_trains_with_an_optimizer_and_a_scheduler_of_its_own(folder, tmp_path):
    module = OwnOptimizer(extra=5, net=HymbaConfig(**NET), log_every_n_steps=1)
    trainer = tiny_trainer(tmp_path, max_steps=10, logger=CSVLogger(tmp_path))
    before = module.net.embed.weight.detach().clone() if hasattr(module.net, "embed") else None
    trainer.fit(module, tiny_data(folder))
    rows = Run.of(trainer).history.train
    assert rows[-1].loss < rows[0].loss - 0.3
    assert before is None or not torch.equal(before, module.net.embed.weight)
    # The rates are the scheduler's, and what follows them in a run knows it.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)
    assert [row.lr_scale for row in rows] == pytest.approx([1 - 0.09 * step for step in range(10)])
    assert "own" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = OwnOptimizer.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert (again.extra, again.net.config) == (5, module.net.config)


def test_a_run_whose_accumulation_changes_keeps_its_schedule_and_goes_on_alike(folder, tmp_path):
    class SaveWithin(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def trained(path=None):
        callbacks = [GradientAccumulationScheduler({1: 4}), *([] if path else [SaveWithin()])]
        trainer = tiny_trainer(tmp_path, max_steps=-1, max_epochs=2, limit_train_batches=6, callbacks=callbacks)
        trainer.fit(tiny_module(), tiny_data(folder), ckpt_path=path)
        return trainer.global_step, [(row.step, row.tokens, row.lr_scale) for row in Run.of(trainer).history.train]

    # An epoch of six steps, one of two: the rates fall to the end.
    steps, rows = trained()
    assert steps == 8
    assert rows[-1][2] == pytest.approx(0.1 + 0.9 / 7, abs=0.03)
    assert trained(tmp_path / "cut.ckpt") == (8, rows)


class OwnLoader(HymbaDataModule):
    """As users write it: the package's validation, and training data that end."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(*torch.randint(0, 1024, (2, 8, 64))), batch_size=2)


def test_a_datamodule_with_a_loader_of_its_own_that_ends_may_end_the_run(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=-1, max_epochs=2, val_check_interval=0.5, check_val_every_n_epoch=1)
    trainer.fit(tiny_module(), OwnLoader(str(folder), seq_len=64, micro_batch_size=2))
    assert (trainer.global_step, len(Run.of(trainer).history.val)) == (8, 4)


class OwnStep(HymbaModule):
    """As users write it: a loss of their own, on the network itself."""

    def training_step(self, batch, batch_idx):
        loss = self.net(batch.inputs, batch.targets) * 3
        self.log("mine", loss, prog_bar=True)
        return loss


def test_what_a_step_of_ones_own_trains_is_counted_and_its_loss_shown(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(OwnStep(net=HymbaConfig(**NET), log_every_n_steps=1), tiny_data(folder))
    history = Run.of(trainer).history
    assert history.tokens == 3 * 2 * 2 * 64
    assert [row.step for row in history.train] == [1, 2, 3]
    assert history.train[0].loss == pytest.approx(3 * 6.93, rel=0.01)
    plain = tiny_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    plain.fit(tiny_module(), tiny_data(folder))
    assert Run.of(plain).history.train[0].loss == pytest.approx(6.93, rel=0.01)


def test_a_step_of_ones_own_may_leave_a_batch_out(folder, tmp_path):
    class Sometimes(HymbaModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx != 1 else None

    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.fit(Sometimes(net=HymbaConfig(**NET)), tiny_data(folder))
    assert trainer.global_step == 3


def test_manual_optimization_is_refused(folder, tmp_path):
    module = tiny_module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"automatic_optimization is False, .* from configure_optimizers"):
        tiny_trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(module, tiny_data(folder))


@pytest.mark.parametrize(("interval", "warned"), [(1, False), (3, False), (None, True)])
def test_a_callback_that_waits_for_validations_is_told_where_there_are_none(folder, tmp_path, caplog, interval, warned):
    stopping = EarlyStopping("val/bpb")
    options = {"val_check_interval": interval, "max_steps": 3, "callbacks": [stopping]}
    tiny_trainer(tmp_path, **options).fit(tiny_module(), tiny_data(folder))
    assert ("waits for validations" in caplog.text) == warned
    assert (stopping.best_score < 10) == (not warned)


def test_a_scheduler_of_the_modules_own_optimizer_is_refused(folder, tmp_path):
    class Scheduled(HymbaModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(ValueError, match=r"scheduler would change rates .* model\.optimizer's warmup_share"):
        tiny_trainer(tmp_path).fit(Scheduled(net=HymbaConfig(**NET)), tiny_data(folder))


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (EMAWeightAveraging(), r"model\.average"),
        (StochasticWeightAveraging(0.01), r"model\.average"),
        (LearningRateFinder(), r"model\.optimizer"),
        (BatchSizeFinder(), r"set data\.micro_batch_size"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_callback_that_would_do_the_modules_work_again_is_refused(folder, tmp_path, callback, instead):
    with pytest.raises(ValueError, match=f"{type(callback).__name__} does not go with this module: {instead}"):
        tiny_trainer(tmp_path, callbacks=[callback]).fit(tiny_module(), tiny_data(folder))


def test_validations_at_shares_of_endless_data_are_refused(folder, tmp_path):
    options = {"val_check_interval": 0.25, "check_val_every_n_epoch": 1}
    with pytest.raises(ValueError, match=r"val_check_interval is 0\.25, a share .* give a number of batches"):
        tiny_trainer(tmp_path, **options).fit(tiny_module(), tiny_data(folder))
    for option in ("val_check_interval", "check_val_every_n_epoch"):
        with pytest.raises(ValueError, match=rf"trainer\.{option} is 0: leave it out"):
            tiny_trainer(tmp_path, **{option: 0}).fit(tiny_module(), tiny_data(folder))
    trainer = tiny_trainer(tmp_path, limit_train_batches=8, max_steps=-1, max_epochs=1, **options)
    trainer.fit(tiny_module(), tiny_data(folder))
    assert [row.step for row in Run.of(trainer).history.val] == [2, 4, 6, 8]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_integers_train(tmp_path, dtype):
    ids = torch.arange(200, 240).repeat(10)[:390].view(6, 65).to(dtype)
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=2)
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.fit(tiny_module(), pairs)
    assert trainer.global_step == 3


@pytest.mark.parametrize(("wrong", "named"), [(5000, "5000"), (1024, "1024"), (-100, "-100")])
def test_ids_that_the_network_does_not_have_are_named(tmp_path, wrong, named):
    ids = torch.arange(200, 240).repeat(10)[:390].view(6, 65)
    ids[0, 7] = wrong
    pairs = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=2)
    with pytest.raises(ValueError, match=rf"a batch holds token {named}, but the network knows 0 … 1023"):
        tiny_trainer(tmp_path).fit(tiny_module(), pairs)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"ids": torch.zeros(8)}] * 2, "not dict"),
        ([torch.zeros(8, dtype=torch.int64)] * 2, r"not a tensor of int64 \(2, 8\)"),
        ([(torch.zeros(8, dtype=torch.int64),)] * 2, r"not list of a tensor of int64 \(2, 8\)"),
        ([(torch.zeros(8), torch.zeros(8))] * 2, "not list of a tensor of float32"),
    ],
    ids=["dict", "ids alone", "one part", "floats"],
)
def test_what_is_no_pair_of_ids_is_described(tmp_path, rows, named):
    with pytest.raises(TypeError, match=rf"pair \(inputs, targets\) of \(B, T\) integer token ids, {named}"):
        tiny_trainer(tmp_path).fit(tiny_module(), DataLoader(rows, batch_size=2))


def test_a_subclass_may_take_batches_of_another_form(tmp_path):
    class Named(HymbaModule):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["ids"][:, :-1], batch["ids"][:, 1:]), batch_idx)

    rows = [{"ids": torch.arange(200, 265)}] * 4
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.fit(Named(net=HymbaConfig(**NET)), DataLoader(rows, batch_size=2))
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    "bar", [RichProgressBar(refresh_rate=1), TQDMProgressBar(refresh_rate=1)], ids=["rich", "tqdm"]
)
def test_another_progress_bar_shows_endless_data_as_such(folder, tmp_path, bar):
    trainer = tiny_trainer(tmp_path, max_steps=3, max_epochs=1, callbacks=[bar], enable_progress_bar=True)
    trainer.fit(tiny_module(), tiny_data(folder))
    assert trainer.num_training_batches == bar.total_train_batches == float("inf")
    assert trainer.global_step == 3
    if isinstance(bar, TQDMProgressBar):
        assert bar.train_progress_bar.total is None
    limited = tiny_trainer(tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=2)
    limited.fit(tiny_module(), tiny_data(folder))
    assert (limited.num_training_batches, limited.global_step) == (2, 2)


def test_a_monitor_of_rates_without_a_logger_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"LearningRateMonitor writes to a logger, .* name one, such as CSVLogger"):
        tiny_trainer(tmp_path, callbacks=[LearningRateMonitor()]).fit(tiny_module(), tiny_data(folder))


@pytest.mark.parametrize(("how", "limit"), [("norm", 0.01), ("value", 1e-4)])
def test_gradients_are_clipped_before_the_optimizer_sees_them(folder, tmp_path, how, limit):
    trainer = tiny_trainer(tmp_path, max_steps=3, gradient_clip_val=limit, gradient_clip_algorithm=how)
    used: list[float] = []

    class Watched(HymbaModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: used.append(measured(self)))
            return optimizer

    def measured(module):
        flat = torch.cat([torch.zeros(1), *(p.grad.flatten() for p in module.parameters() if p.grad is not None)])
        return float(flat.norm() if how == "norm" else flat.abs().max())

    trainer.fit(Watched(net=HymbaConfig(**NET)), tiny_data(folder))
    assert len(used) >= 3
    assert used[-3:] == pytest.approx([limit] * 3, rel=1e-3)
