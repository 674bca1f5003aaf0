"""The clock on fake time: what counts, when it stops, what it publishes, over resumes and ranks; then on real time."""

import dataclasses
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_lightning import (
    FakeTime,
    StopAt,
    TimedModule,
    TinyData,
    TinyModule,
    assert_same,
    make_trainer,
    run_ranks,
)

from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.run.run import Run
from hymba_lightning.training.optim import OptimizerConfig


def fit(folder, durations, *, budget, margin=1.0, reserve=0.0, callbacks=(), ckpt=None, **options):
    fake_time = FakeTime(now=123.0)
    module = TimedModule(fake_time, durations)
    clock = WallClock(budget, reserve, margin=margin, time_fn=fake_time)
    trainer = make_trainer(folder, [clock, *callbacks], **options)
    trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt)
    return trainer, module, clock


@pytest.mark.parametrize(("budget", "margin", "steps"), [(10.0, 1.0, 10), (10.5, 1.0, 10), (10.0, 1.05, 9)])
def test_the_last_step_ends_inside_the_budget_and_no_further_one_runs(tmp_path, budget, margin, steps):
    trainer, module, clock = fit(tmp_path, [1.0], budget=budget, margin=margin)
    assert trainer.global_step == module.micro_batches == steps
    assert clock.elapsed() == pytest.approx(steps)
    assert clock.stop_reason == "budget"


def test_the_reserve_is_not_trained_in(tmp_path):
    trainer, _, clock = fit(tmp_path, [1.0], budget=10.0, reserve=3.5)
    assert trainer.global_step == 6
    assert clock.reading.budget == 6.5


def test_readings_come_at_the_first_micro_batch_of_each_step(tmp_path):
    trainer, module, clock = fit(tmp_path, [0.25], budget=10.0, accumulate_grad_batches=4)
    assert trainer.global_step == 10
    assert module.micro_batches == 40
    assert [r.step for r in module.readings] == list(range(10))
    assert [r.elapsed for r in module.readings] == pytest.approx(range(10))
    assert [r.progress for r in module.readings] == pytest.approx([i / 10 for i in range(10)])
    assert [r.remaining for r in module.readings] == pytest.approx([10 - i for i in range(10)])
    assert module.readings[0].mean_step is None
    assert module.readings[5].mean_step == pytest.approx(1.0)
    assert clock.reading.progress == 1.0


def test_the_schedule_follows_the_clock(tmp_path):
    lr = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            lr.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["base_lr"])

    fake_time = FakeTime()
    module = TimedModule(fake_time, [1.0], OptimizerConfig(warmup_share=0, warmdown_iters=4, lr_floor=0))
    trainer = make_trainer(tmp_path, [WallClock(8.0, margin=1.0, time_fn=fake_time), Rates()])
    trainer.fit(module, datamodule=TinyData())
    assert lr == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_validation_and_pauses_do_not_count(tmp_path):
    class Saving(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with Run.of(trainer).clock.paused():
                with Run.of(trainer).clock.paused():
                    pl_module.fake_time.advance(1000.0)
                pl_module.fake_time.advance(1000.0)
            pl_module.fake_time.advance(0.5)  # this does

    trainer, _, clock = fit(
        tmp_path,
        [1.0],
        budget=15.0,
        callbacks=[Saving()],
        limit_val_batches=2,
        val_check_interval=2,
        num_sanity_val_steps=2,
    )
    assert trainer.global_step == 10
    # What other callbacks do after the last step's reading is no longer training.
    assert clock.elapsed() == pytest.approx(10 + 9 * 0.5)
    with clock.paused():
        pass
    assert clock.elapsed() == pytest.approx(14.5)


def test_time_before_the_first_batch_does_not_count(tmp_path):
    class Compiling(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.fake_time.advance(500.0)

    _, _, clock = fit(tmp_path, [1.0], budget=3.0, callbacks=[Compiling()])
    assert clock.elapsed() == pytest.approx(3.0)


def test_work_charged_after_training_counts(tmp_path):
    _, module, clock = fit(tmp_path, [1.0], budget=10.0, reserve=5.0)
    module.fake_time.advance(77.0)
    with clock.charged():
        module.fake_time.advance(2.0)
    module.fake_time.advance(77.0)
    assert clock.elapsed() == pytest.approx(7.0)


def test_work_charged_to_the_reserve_is_not_told_as_a_slow_step(tmp_path, recwarn):
    class Calibrating(Callback):
        def on_train_end(self, trainer, pl_module):
            clock = Run.of(trainer).clock
            clock.end()
            with clock.charged():
                pl_module.fake_time.advance(2.0)

    fake_time = FakeTime()
    clock = WallClock(10.0, 5.0, margin=1.0, time_fn=fake_time)
    # Callbacks of the command line come before the module's clock.
    make_trainer(tmp_path, [Calibrating(), clock]).fit(TimedModule(fake_time, [1.0]), datamodule=TinyData())
    assert clock.elapsed() == pytest.approx(7.0)
    assert not any("longer than predicted" in str(w.message) for w in recwarn)


def test_a_slow_step_shortens_the_run_instead_of_overrunning(tmp_path):
    # The step of 4 s is recent when the end nears: the clock allows for another one.
    trainer, _, clock = fit(tmp_path, [1.0] * 5 + [4.0, 1.0], budget=15.0)
    assert clock.elapsed() == pytest.approx(12.0)
    assert trainer.global_step == 9
    # Once it is long past, it no longer costs anything.
    trainer, _, clock = fit(tmp_path, [1.0] * 5 + [4.0, 1.0], budget=60.0)
    assert clock.elapsed() == pytest.approx(60.0)


def test_the_stated_limit_a_slow_very_last_step(tmp_path, recwarn):
    _, _, clock = fit(tmp_path, [1.0] * 9 + [1.4], budget=10.0)
    assert clock.elapsed() == pytest.approx(10.4)
    assert any("took 10.40 s of 10.00 s" in str(w.message) for w in recwarn)


def test_a_budget_under_one_step_runs_one_and_says_so(tmp_path, recwarn):
    trainer, _, _ = fit(tmp_path, [5.0], budget=1.0)
    assert trainer.global_step == 1
    assert any("does not fit one step" in str(w.message) for w in recwarn)


def test_without_budget_progress_follows_the_step_limit(tmp_path):
    trainer, module, clock = fit(tmp_path, [1.0], budget=None, max_steps=4)
    assert trainer.global_step == 4
    assert [r.progress for r in module.readings] == [0.0, 0.25, 0.5, 0.75]
    assert [r.remaining_steps for r in module.readings] == [4, 3, 2, 1]
    assert module.readings[3].remaining is None
    assert clock.elapsed() == pytest.approx(4.0)
    assert clock.stop_reason is None


def test_the_nearer_limit_decides(tmp_path):
    trainer, module, _ = fit(tmp_path, [1.0], budget=100.0, max_steps=4)
    assert trainer.global_step == 4
    assert module.readings[2].progress == 0.5
    trainer, module, _ = fit(tmp_path, [1.0], budget=4.0, max_steps=100)
    assert trainer.global_step == 4
    assert module.readings[2].progress == 0.5


def test_a_resumed_run_spends_the_budget_once(tmp_path):
    first, _, clock = fit(tmp_path, [1.0], budget=10.0, callbacks=[StopAt(4)])
    first.save_checkpoint(tmp_path / "x.ckpt")
    assert clock.elapsed() == pytest.approx(4.0)
    trainer, module, clock = fit(tmp_path, [2.0], budget=10.0, ckpt=tmp_path / "x.ckpt")
    assert [r.elapsed for r in module.readings] == pytest.approx([4.0, 6.0, 8.0])
    assert [r.step for r in module.readings] == [4, 5, 6]
    assert module.readings[-1].mean_step == pytest.approx(8 / 6)
    assert clock.elapsed() == pytest.approx(10.0)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="already spent"):
        again, module, _ = fit(tmp_path, [1.0], budget=10.0, ckpt=tmp_path / "end.ckpt")
    assert module.micro_batches == 0
    assert again.global_step == 7


def test_a_requested_stop_ends_after_the_step_in_progress(tmp_path):
    class Ask(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                clock = trainer.callbacks[0]
                clock.request_stop(15)

    trainer, module, clock = fit(tmp_path, [1.0], budget=100.0, callbacks=[Ask()], accumulate_grad_batches=4)
    assert trainer.global_step == 2
    assert module.micro_batches == 8
    assert (clock.stop_reason, clock.stop_code) == ("request", 15)


@pytest.mark.parametrize("options", [{"min_steps": 5}, {"min_epochs": 1}])
def test_lower_limits_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="min_steps"):
        fit(tmp_path, [1.0], budget=1.0, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_seconds": 0.0}, "budget_seconds is 0"),
        ({"budget_seconds": 1e308}, r"at most 1,000,000,000"),
        ({"budget_seconds": 10.0, "reserve_seconds": 10.0}, "leaves nothing"),
        ({"reserve_seconds": -1.0}, "reserve_seconds is -1"),
        ({"margin": 0.5}, "margin is 0.5"),
        ({"recent_steps": 0}, "recent_steps is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        WallClock(**arguments)


def test_no_reading_before_training():
    with pytest.raises(RuntimeError, match="no reading"):
        _ = WallClock().reading


@pytest.mark.alone
def test_real_seconds(tmp_path):
    clock, module = WallClock(3.0), TinyModule(step_seconds=0.02)
    trainer = make_trainer(tmp_path, [clock], limit_val_batches=1, val_check_interval=20)
    start = time.monotonic()
    trainer.fit(module, datamodule=TinyData())
    wall = time.monotonic() - start
    assert 2.5 < clock.elapsed() <= 3.0
    assert clock.elapsed() < wall
    assert trainer.global_step == len(module.losses) > 50


def _fit_with_unlike_clocks(rank, folder):
    results = {}
    # Rank 1's seconds are three times as fast, and start elsewhere.
    fake_time = FakeTime(now=1e6 * rank, speed=1.0 + 2.0 * rank)
    module = TimedModule(fake_time, [0.5] * 3 + [1.5, 0.5], OptimizerConfig())
    clock = WallClock(10.0, time_fn=fake_time)
    trainer = make_trainer(
        folder,
        [clock],
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        limit_val_batches=1,
        val_check_interval=4,
    )
    trainer.fit(module, datamodule=TinyData())
    results["budget"] = {
        "steps": trainer.global_step,
        "readings": [dataclasses.astuple(r) for r in module.readings],
        "weights": module.weights(),
        "elapsed": clock.elapsed(),
    }

    class AskOnOneRank(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if rank == 1 and batch_idx == 3:
                clock.request_stop(2)

    clock = WallClock(None)
    trainer = make_trainer(folder, [clock, AskOnOneRank()], devices=2, strategy="ddp", max_steps=50)
    trainer.fit(TinyModule(), datamodule=TinyData())
    results["request"] = (trainer.global_step, clock.stop_code)
    torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.mark.ddp
def test_ranks_with_unlike_clocks_agree(tmp_path):
    run_ranks(_fit_with_unlike_clocks, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["request"] == second["request"] == (4, 2)
    first, second = first["budget"], second["budget"]
    assert first["readings"] == second["readings"]
    assert first["steps"] == second["steps"] == len(first["readings"])
    assert first["elapsed"] == pytest.approx(second["elapsed"])
    assert 8.0 <= first["elapsed"] <= 10.0
    assert_same(first["weights"], second["weights"])
