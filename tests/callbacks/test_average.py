"""Averaged weights: the formula, what validation and test see, and exact resume from every kind of checkpoint."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from tiny_lightning import StopAt, TinyData, TinyModule, assert_same, make_trainer
from torch.nn.utils import prune

from hymba_lightning.callbacks.average import WeightAverage
from hymba_lightning.callbacks.wall_clock import WallClock
from hymba_lightning.training.optim import OptimizerConfig

FLAT = OptimizerConfig(warmup_share=0, warmdown_share=0, momentum_warmup_share=0)


class Recorder(Callback):
    """Weights after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.steps.append(parameters(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == len(self.steps):
            self.steps.append(parameters(pl_module))


def parameters(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def optimizer_state(trainer):
    state = copy.deepcopy(trainer.optimizers[0].state_dict())
    return {f"{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()}


def test_average_starts_from_the_initial_weights_and_follows_the_formula(tmp_path):
    module, recorder, ema = TinyModule(), Recorder(), WeightAverage(decay=0.9)
    make_trainer(tmp_path, [ema, recorder], max_steps=5).fit(module, datamodule=TinyData())
    expected = {n: w.double() for n, w in recorder.steps[0].items()}
    for weights in recorder.steps[1:]:
        expected = {n: 0.9 * e + 0.1 * weights[n].double() for n, e in expected.items()}
    for name, p in module.named_parameters():
        assert torch.allclose(p.double(), expected[name], rtol=1e-6, atol=1e-7), name
    assert module.net.calls == 5  # a counter is not averaged


class Pruning(Callback):
    """As Lightning's own, which prunes at the end of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        for module in list(pl_module.modules()):
            if isinstance(module, torch.nn.Linear) and "weight" in module._parameters:
                prune.random_unstructured(module, "weight", amount=0.5)


def test_lightnings_pruning_is_refused_where_an_average_would_undo_it(tmp_path):
    """It comes after the last step, so that no step of the average sees a zero."""
    for average, refused in ((WeightAverage(decay=0.9), True), (WeightAverage(kind="none"), False)):
        pruning = ModelPruning("random_unstructured", amount=0.5)
        trainer, module = make_trainer(tmp_path, [average, pruning], max_steps=2), TinyModule()
        if refused:
            with pytest.raises(ValueError, match=r"has no zeros: set model\.average: none"):
                trainer.fit(module, datamodule=TinyData())
        else:
            trainer.fit(module, datamodule=TinyData())
            weights = torch.cat([p.flatten() for n, p in module.named_parameters() if "weight" in n])
            assert 0.3 < float((weights == 0).float().mean()) < 0.7


def test_weights_that_are_pruned_in_the_middle_of_training_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"weight_orig came in the middle of training .* set model\.average: none"):
        make_trainer(tmp_path, [WeightAverage(decay=0.9), Pruning()], max_steps=3).fit(
            TinyModule(), datamodule=TinyData()
        )
    module = TinyModule()
    make_trainer(tmp_path, [WeightAverage("none"), Pruning()], max_steps=3).fit(module, datamodule=TinyData())
    assert any(name.endswith("weight_orig") for name, _ in module.named_parameters())


def test_only_optimizer_steps_count(tmp_path):
    ema = WeightAverage(decay=0.9)
    make_trainer(tmp_path, [ema], max_steps=3, accumulate_grad_batches=4).fit(TinyModule(), datamodule=TinyData())
    assert ema.n_averaged == 3


def test_bfloat16_weights_have_a_float32_average_that_moves(tmp_path):
    module, ema = TinyModule(), WeightAverage(decay=0.999)
    module.net.bfloat16()
    before = parameters(module)
    make_trainer(tmp_path, [ema], max_steps=3).fit(module, datamodule=TinyData())
    shadow = ema._shadow["net.tok_emb.weight"]
    assert shadow.dtype == torch.float32
    assert not torch.equal(shadow, before["net.tok_emb.weight"].float())


def test_validation_and_tests_see_the_average(tmp_path):
    module, recorder, ema = TinyModule(), Recorder(), WeightAverage(decay=0.5)
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, filename="four", save_top_k=-1)
    trainer = make_trainer(
        tmp_path, [ema, recorder, save], max_steps=4, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1
    )
    trainer.fit(module, datamodule=TinyData())
    name = "net.tok_emb.weight"
    w = [s[name] for s in recorder.steps]
    two = torch.lerp(torch.lerp(w[0], w[1], 0.5), w[2], 0.5)
    four = torch.lerp(torch.lerp(two, w[3], 0.5), w[4], 0.5)
    for seen, expected in zip(module.val_weights, [w[0], two, four], strict=True):
        assert torch.allclose(seen, expected, atol=1e-6)
    trainer.test(module, datamodule=TinyData())
    trainer.test(module, datamodule=TinyData(), ckpt_path=tmp_path / "four.ckpt")
    trainer.validate(module, datamodule=TinyData(), ckpt_path=tmp_path / "four.ckpt")
    for seen in (*module.test_weights, module.val_weights[-1]):
        assert torch.allclose(seen, four, atol=1e-6)
    assert not torch.allclose(four, w[4], atol=1e-3)


@pytest.mark.parametrize("kind", [{"decay": 0.9}, {"window": 0.4}, {"kind": "uniform", "window": 0.7}])
@pytest.mark.parametrize("when", ["at a step", "during validation", "after training"])
def test_resume_is_bit_exact(tmp_path, when, kind):
    def run(folder, steps, ckpt=None, callbacks=()):
        module, ema, data = TinyModule(FLAT, dropout=0.0), WeightAverage(**kind), TinyData()
        trainer = make_trainer(
            folder, [WallClock(), ema, *callbacks], max_steps=steps, limit_val_batches=1, val_check_interval=3
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        with ema.raw_weights(module):
            raw = module.weights()
        return trainer, module, raw

    whole_trainer, whole, whole_raw = run(tmp_path, 6)
    half = tmp_path / "half.ckpt"
    if when == "after training":
        run(tmp_path, 6, callbacks=[StopAt(3)])[0].save_checkpoint(half)
    elif when == "at a step":
        save = ModelCheckpoint(dirpath=tmp_path, filename="half", every_n_train_steps=3)
        run(tmp_path, 6, callbacks=[save, StopAt(3)])
    else:
        save = ModelCheckpoint(dirpath=tmp_path, filename="half", monitor="val/loss")
        run(tmp_path, 6, callbacks=[save, StopAt(3)])
    resumed_trainer, resumed, resumed_raw = run(tmp_path, 6, ckpt=half)
    assert resumed_trainer.global_step == 6
    assert_same(whole_raw, resumed_raw)
    assert_same(whole.weights(), resumed.weights())
    assert_same(optimizer_state(whole_trainer), optimizer_state(resumed_trainer))


def test_checkpoints_hold_the_average_under_every_name_and_the_raw_weights(tmp_path):
    module, recorder, ema = TinyModule(), Recorder(), WeightAverage(decay=0.5)
    trainer = make_trainer(tmp_path, [ema, recorder], max_steps=2)
    trainer.fit(module, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    assert saved["averaging_state"] == {"n_averaged": torch.tensor(2), "kind": "ema"}
    w0, w1, w2 = (s["net.blocks.0.attn.c_q.weight"] for s in recorder.steps)
    for name in ("net.blocks.0.attn.c_q.weight", "net.blocks.1.attn.c_q.weight"):  # shared
        average = torch.lerp(torch.lerp(w0, w1, 0.5), w2, 0.5)
        assert torch.allclose(saved["state_dict"][name], average, atol=1e-7)
        assert torch.equal(saved["current_model_state"][name], w2)
    trainer.test(module, datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt")
    assert not ema.has_average  # the module holds loaded weights now; nothing here belongs to them


def test_a_plain_checkpoint_starts_the_average_from_its_weights(tmp_path):
    plain = make_trainer(tmp_path, [WeightAverage("none")], max_steps=2)
    module = TinyModule(FLAT)
    plain.fit(module, datamodule=TinyData())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    assert "current_model_state" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)
    ema, resumed = WeightAverage(decay=0.999999), TinyModule(FLAT)
    trainer = make_trainer(tmp_path, [ema], max_steps=3)
    trainer.fit(resumed, datamodule=TinyData(), ckpt_path=tmp_path / "plain.ckpt")
    assert torch.allclose(resumed.net.tok_emb.weight, module.net.tok_emb.weight, atol=1e-4)
    assert ema.n_averaged == 1


def test_training_goes_on_from_the_raw_weights_even_without_average(tmp_path):
    module, ema = TinyModule(FLAT), WeightAverage(decay=0.9)
    trainer = make_trainer(tmp_path, [ema], max_steps=3)
    trainer.fit(module, datamodule=TinyData())
    with ema.raw_weights(module):
        raw = module.weights()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seen = Recorder()
    off = make_trainer(tmp_path, [WeightAverage("none"), seen], max_steps=4)
    off.fit(TinyModule(FLAT), datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(seen.steps[0]["net.tok_emb.weight"], raw["tok_emb.weight"])


def test_the_window_is_a_share_of_the_steps_so_far(tmp_path):
    module, recorder, average = TinyModule(), Recorder(), WeightAverage(window=0.25)
    make_trainer(tmp_path, [average, recorder], max_steps=12).fit(module, datamodule=TinyData())
    expected = recorder.steps[4]  # up to step 4 the window is shorter than a step
    for step in range(5, 13):
        expected = {n: torch.lerp(e, recorder.steps[step][n], 4 / step) for n, e in expected.items()}
    for name, p in module.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(p, recorder.steps[12][name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("n_steps", [20, 200, 2000])
def test_the_mean_age_of_what_is_averaged_is_the_window_at_any_length(n_steps):
    # Weights that are their own step number: the average then is the step it stands for.
    average = WeightAverage(window=0.05)
    average._shadow = {"w": torch.zeros(())}
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    module, trainer = torch.nn.Module(), SimpleNamespace(global_step=0, callbacks=[], optimizers=[optimizer])
    module.w = torch.nn.Parameter(torch.zeros(()))
    for step in range(1, n_steps + 1):
        trainer.global_step = step
        module.w.data.fill_(step)
        average.on_train_batch_end(trainer, module, None, None, 0)
    age = n_steps - float(average._shadow["w"])
    assert age == pytest.approx(0.05 / 1.05 * n_steps, rel=0.02, abs=1.0)


@pytest.mark.parametrize("n_steps", [12, 120])
def test_the_window_closes_with_the_warmdown(tmp_path, n_steps):
    """The average must not lag behind a warmdown: where the rates are near 0, it is at the trained weights."""
    module, average, recorder = TinyModule(OptimizerConfig(lr_floor=0)), WeightAverage(window=0.1), Recorder()
    lag = []

    class Lag(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw, shadow = pl_module.net.tok_emb.weight.detach(), average._shadow["net.tok_emb.weight"]
            lag.append(float((raw - shadow).norm()))

    trainer = make_trainer(tmp_path, [WallClock(), average, recorder, Lag()], max_steps=n_steps)
    trainer.fit(module, datamodule=TinyData())
    assert lag[-1] == 0.0
    assert n_steps == 12 or max(lag) > 0.0


def test_uniform_average_of_the_last_share_of_the_run(tmp_path):
    module, recorder, average = TinyModule(), Recorder(), WeightAverage("uniform", 0.25)
    trainer = make_trainer(tmp_path, [WallClock(), average, recorder], max_steps=8)
    trainer.fit(module, datamodule=TinyData())
    assert average.n_averaged == 2  # after steps 7 and 8 of 8
    mean = (recorder.steps[7]["net.tok_emb.weight"] + recorder.steps[8]["net.tok_emb.weight"]) / 2
    assert torch.allclose(module.net.tok_emb.weight, mean, atol=1e-6)


def test_before_its_share_of_the_run_the_uniform_average_is_the_weights(tmp_path):
    module, average = TinyModule(), WeightAverage("uniform", 0.25)
    trainer = make_trainer(tmp_path, [WallClock(), average, StopAt(2)], max_steps=8)
    trainer.fit(module, datamodule=TinyData())
    assert not average.has_average
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert_same(saved["state_dict"], saved["current_model_state"])


def test_a_finished_run_given_more_time_averages_its_new_end(tmp_path):
    first = make_trainer(tmp_path, [WallClock(), WeightAverage("uniform", 0.25)], max_steps=8)
    first.fit(TinyModule(FLAT), datamodule=TinyData())
    first.save_checkpoint(tmp_path / "x.ckpt")
    average = WeightAverage("uniform", 0.25)
    trainer = make_trainer(tmp_path, [WallClock(), average], max_steps=16)
    trainer.fit(TinyModule(FLAT), datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt")
    assert average.n_averaged == 4  # steps 13 to 16


def test_the_uniform_average_asks_for_a_clock(tmp_path):
    trainer = make_trainer(tmp_path, [WeightAverage("uniform", 0.25)], max_steps=2)
    with pytest.raises(RuntimeError, match="WallClock"):
        trainer.fit(TinyModule(), datamodule=TinyData())


def test_a_checkpoint_with_another_kind_of_average_starts_this_one_anew_and_says_so(tmp_path, caplog):
    trainer = make_trainer(tmp_path, [WallClock(), WeightAverage("uniform", 0.5)], max_steps=4)
    trainer.fit(TinyModule(FLAT), datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    raw = torch.load(tmp_path / "x.ckpt", weights_only=True)["current_model_state"]["net.tok_emb.weight"]
    average = WeightAverage(decay=0.999999)
    with caplog.at_level(logging.INFO, "hymba_lightning"):
        resumed = make_trainer(tmp_path, [average], max_steps=5)
        resumed.fit(module := TinyModule(FLAT), datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt")
    assert "average is of kind 'uniform', this run's of kind 'ema'" in caplog.text
    assert average.n_averaged == 1
    assert torch.allclose(module.net.tok_emb.weight, raw, atol=1e-5)


def test_a_checkpoint_from_before_the_kind_was_kept_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, [WeightAverage(decay=0.9)], max_steps=4)
    trainer.fit(TinyModule(FLAT), datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    old = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del old["averaging_state"]["kind"]
    torch.save(old, tmp_path / "old.ckpt")
    average = WeightAverage(window=0.1)
    make_trainer(tmp_path, [average], max_steps=6).fit(
        TinyModule(FLAT), datamodule=TinyData(), ckpt_path=tmp_path / "old.ckpt"
    )
    assert average.n_averaged == 6


@pytest.mark.parametrize(("steps", "told"), [(60, True), (2000, False)])
def test_a_decay_too_long_for_the_run_is_told_once(tmp_path, caplog, steps, told):
    callbacks = [WallClock(), WeightAverage(decay=0.997), StopAt(3)]
    make_trainer(tmp_path, callbacks, max_steps=steps).fit(TinyModule(FLAT), datamodule=TinyData())
    lines = [line for line in caplog.messages if "ema_decay" in line]
    assert len(lines) == told
    assert not told or (
        "0.997 is too long for this run of about 60 steps" in lines[0]
        and "84 %" in lines[0]
        and "average_window" in lines[0]
    )


def test_swaps_are_exact_and_nest(tmp_path):
    module, ema = TinyModule(), WeightAverage(decay=0.5)

    class Inside(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw = parameters(pl_module)
            with ema.swapped(pl_module):
                average = parameters(pl_module)
                assert not torch.equal(average["net.tok_emb.weight"], raw["net.tok_emb.weight"])
                with ema.raw_weights(pl_module):
                    assert_same(parameters(pl_module), raw)
                with ema.swapped(pl_module):
                    assert_same(parameters(pl_module), average)
            assert_same(parameters(pl_module), raw)
            self.done = True

    inside = Inside()
    make_trainer(tmp_path, [ema, inside], max_steps=2).fit(module, datamodule=TinyData())
    assert inside.done


def test_an_exception_in_validation_leaves_the_raw_weights(tmp_path):
    class Failing(TinyModule):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken validation")

    module, recorder = Failing(), Recorder()
    trainer = make_trainer(
        tmp_path, [WeightAverage(decay=0.5), recorder], max_steps=4, limit_val_batches=1, val_check_interval=2
    )
    with pytest.raises(RuntimeError, match="broken validation"):
        trainer.fit(module, datamodule=TinyData())
    assert_same(parameters(module), recorder.steps[2])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"decay": 1.0}, "ema_decay"),
        ({"window": 0.0}, "average_window"),
        ({"window": 1.5}, "average_window"),
        ({"kind": "swa"}, "average is 'swa'"),
        ({"kind": "uniform", "decay": 0.9}, "ema_decay"),
    ],
)
def test_bad_arguments_are_named(arguments, field):
    with pytest.raises(ValueError, match=field):
        WeightAverage(**arguments)
