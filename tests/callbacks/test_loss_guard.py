"""NaN and infinity: found at their step, also a step late as on a GPU; left out without a trace in the weights."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.callbacks.loss_guard import LossGuard, NonFiniteLossError


class Poison(Callback):
    """Makes gradients of some steps infinite, as an overflow in the backward pass would."""

    def __init__(self, *steps):
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            pl_module.net.tok_emb.weight.grad[5, 1] = float("inf")


class Late:
    """Stands in for a CUDA event."""

    def synchronize(self):
        self.waited = True


class LateGuard(LossGuard):
    """Learns of a step after the next one, as on a GPU."""

    def _flags_of(self, step, gradient_ok):
        flags = super()._flags_of(step, gradient_ok)
        flags.event = Late()
        return flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def fit(folder, tmp_path, *callbacks, **arguments):
    module = tiny_module(compile_warmup_steps=0, **arguments)
    saves = any(isinstance(callback, TrainingCheckpoint) for callback in callbacks)
    trainer = tiny_trainer(tmp_path, max_steps=6, callbacks=list(callbacks), enable_checkpointing=saves)
    trainer.fit(module, tiny_data(folder))
    return trainer, module


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.net.parameters()])


def test_an_infinite_gradient_behind_a_finite_loss_is_found(folder, tmp_path):
    with pytest.raises(
        NonFiniteLossError,
        match=r"gradient of step 3 is not finite, though its losses are; its batch: "
        r".*tiny_train_000000\.bin from token 260, ",
    ):
        fit(folder, tmp_path, Poison(2))


def test_learning_of_it_a_step_late_saves_no_bad_weights(folder, tmp_path):
    save = TrainingCheckpoint(str(tmp_path), every_n_seconds=None, every_n_steps=1)
    with pytest.warns(UserWarning, match="weights are not finite"), pytest.raises(NonFiniteLossError, match="step 3 "):
        fit(folder, tmp_path, LateGuard(), save, Poison(2))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("guard", [LossGuard, LateGuard])
def test_the_last_step_is_looked_at_before_the_end(folder, tmp_path, guard):
    with pytest.raises(NonFiniteLossError, match="step 6 "):
        fit(folder, tmp_path, guard(), Poison(5))


def test_a_skipped_gradient_counts_as_zero(folder, tmp_path, caplog):
    class Zero(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2:
                for parameter in pl_module.net.parameters():
                    parameter.grad.zero_()

    _, expected = fit(folder, tmp_path, Zero())
    trainer, module = fit(folder, tmp_path, Poison(2), on_nan="skip")
    guard = next(c for c in trainer.callbacks if isinstance(c, LossGuard))
    assert guard.skipped_steps == [3]
    assert "step 3 is not finite" in caplog.text
    assert torch.equal(weights(expected), weights(module))


def test_endless_skipping_ends(folder, tmp_path):
    with pytest.raises(NonFiniteLossError, match="3 steps in a row were left out; the last: the gradient of step 5"):
        fit(folder, tmp_path, LossGuard("skip", most_in_a_row=3), Poison(0, 2, 3, 4))


def test_accumulated_losses_are_told_apart(folder, tmp_path):
    module = tiny_module(compile_warmup_steps=0)
    original = module.training_step

    def training_step(batch, batch_idx):
        return original(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1)

    module.training_step = training_step
    trainer = tiny_trainer(tmp_path, max_steps=4, accumulate_grad_batches=2)
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 ") as failure:
        trainer.fit(module, tiny_data(folder))
    # The fourth micro-batch of two sequences of 65 tokens, not the third.
    assert "from token 390" in str(failure.value)
    assert "from token 260" not in str(failure.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nan": "ignore"}, "choose from stop, skip"),
        ({"most_in_a_row": 0}, "must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossGuard(**arguments)
