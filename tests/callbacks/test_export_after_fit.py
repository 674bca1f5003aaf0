"""The export at the end of a fit with precision solved for: calibrated inside the clock, or without any data."""

import time

import pytest
import torch
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.quantization import QuantizationConfig, load_artifact
from hymba_lightning.quantization.schemes import Calibration
from hymba_lightning.run import Run, RunRecord, calibration
from hymba_lightning.run.calibration import calibrate_in_time, rehearse

BUDGET = 61_803


@pytest.mark.parametrize("gptq", [False, True])
def test_a_fit_ends_with_an_artifact_that_just_fits(tmp_path, gptq):
    scheme = QuantizationConfig(scheme="mixed", gptq=gptq, limit_bytes=BUDGET + evaluation_code_bytes())
    export = ExportArtifact(quantization=scheme, calibration_batches=2)
    module, data = tiny_module(), tiny_data(write_data(tmp_path / "data"))
    asked: list[int] = []
    batches = data.calibration_batches
    data.calibration_batches = lambda n: asked.append(n) or batches(n)
    trainer = tiny_trainer(tmp_path, callbacks=[export])
    trainer.fit(module, data)
    assert asked == ([2] if gptq else [])  # training data is touched only where it counts as training
    size = (tmp_path / "artifact.hymba").stat().st_size
    record = Run.of(trainer).record
    assert 0.99 * BUDGET < size == record.artifact.bytes <= BUDGET
    assert record == RunRecord.load(tmp_path)
    assert load_artifact(tmp_path / "artifact.hymba").quantization["scheme"] == "mixed"
    stages = record.stages()
    assert stages["artifact"].bpb == pytest.approx(stages["ema"].bpb, abs=0.02)
    assert stages["artifact"].bpb != stages["ema"].bpb


def test_the_rehearsal_before_the_clock_changes_nothing_and_tells_a_short_reserve(tmp_path, caplog):
    class Rehearsed(ExportArtifact):
        def on_train_start(self, trainer, pl_module):  # on a GPU by itself
            rehearse(trainer, pl_module, self.settings.quantization, self.settings.calibration_batches)

    scheme = QuantizationConfig(scheme="mixed", gptq=True, limit_bytes=BUDGET + evaluation_code_bytes())
    data = write_data(tmp_path / "data")
    for export in (ExportArtifact, Rehearsed):
        callback = export(filename=f"{export.__name__}.hymba", quantization=scheme, calibration_batches=2)
        module = tiny_module(budget_seconds=3600, optimizer={"warmdown_iters": 0})
        tiny_trainer(tmp_path / export.__name__, callbacks=[callback]).fit(module, tiny_data(data))
    plain, rehearsed = (
        load_artifact(tmp_path / export.__name__ / f"{export.__name__}.hymba").state_dict
        for export in (ExportArtifact, Rehearsed)
    )
    assert all((plain[name] == rehearsed[name]).all() for name in plain)
    assert "model.reserve_seconds holds back 0.0 s of the budget, " in caplog.text
    assert "some 1 of 2 batches will be used; raise it for more" in caplog.text
    caplog.clear()
    callback = Rehearsed(quantization=scheme, calibration_batches=2)
    module = tiny_module(budget_seconds=3600, reserve_seconds=600)
    tiny_trainer(tmp_path / "long", callbacks=[callback]).fit(module, tiny_data(data))
    assert "holds back" not in caplog.text


class Clock:
    """A training clock that calibration drives: one batch takes the next of `seconds`."""

    def __init__(self, budget: float | None, now: float, seconds: list[float]) -> None:
        self.budget_seconds, self.now, self.seconds = budget, now, iter(seconds)

    def elapsed(self) -> float:
        return self.now

    def calibrate(self, net, config, batches, seed):
        (batch,) = batches
        self.now += next(self.seconds)
        shared = torch.full((2, 2), float(batch))
        return Calibration({"a": shared, "b": shared}, {"a": torch.full((3,), 10.0 * seed)})


@pytest.mark.parametrize(
    ("budget", "seconds", "done"),
    [
        (600.0, [0.6] * 16, 16),
        (600.0, [0.66] * 16, 14),  # the fifteenth would end inside, but leave no time to add up
        (600.0, [0.5, 0.5, 4.0, 0.5], 3),
        (595.0, [2.0] * 16, 2),
        (590.0, [2.0] * 16, 1),
        (None, [5.0] * 16, 16),
    ],
)
def test_calibration_takes_the_batches_that_end_inside_the_budget(monkeypatch, budget, seconds, done):
    clock = Clock(budget, 590.0, seconds)
    monkeypatch.setattr(calibration, "look", clock.calibrate)
    batches = (torch.tensor(float(i)) for i in range(16))
    found, used = calibrate_in_time(None, QuantizationConfig(), batches, clock)
    assert used == done
    assert clock.now <= (budget or 1e9) or done == 1
    # The mean over the batches, once for a tensor of two names.
    assert found.hessians["a"] is found.hessians["b"]
    assert found.hessians["a"][0, 1] == pytest.approx((done - 1) / 2)
    # As if as many inputs as there are columns had been seen besides, once for all batches of a token each.
    assert found.hessians["a"][0, 0] == pytest.approx((done - 1) / 2 * (1 + 2 / done))
    assert found.sensitivities["a"][0] == pytest.approx(10 * (done - 1) / 2)


def test_ranks_that_calibrated_on_unlike_numbers_of_batches_count_by_them(monkeypatch):
    clock = Clock(600.0, 590.0, [4.0] * 16)
    monkeypatch.setattr(calibration, "look", clock.calibrate)
    # Another rank had time for three batches, of sum 12 each.
    others = iter([3, 36.0, 36.0])
    monkeypatch.setattr(calibration, "sum_over_ranks", lambda tensor: tensor.add_(next(others)))
    batches = (torch.tensor(float(i)) for i in range(16))
    found, used = calibrate_in_time(None, QuantizationConfig(), batches, clock)
    assert used == 5  # two here: 0 and 1
    assert found.hessians["a"][0, 1] == pytest.approx((0 + 1 + 36) / 5)
    assert found.sensitivities["a"][0] == pytest.approx((0 + 10 + 36) / 5)


def test_a_run_on_a_slow_machine_ends_inside_its_budget_with_fewer_batches(tmp_path, caplog, monkeypatch, recwarn):
    """A batch takes 0.4 s and the reserve is 1 s: the warning is of the calibration, and no step was too slow."""
    calibrated = calibration.look

    def slow(*args, **kwargs):
        time.sleep(0.4)
        return calibrated(*args, **kwargs)

    monkeypatch.setattr(calibration, "look", slow)
    scheme = QuantizationConfig(scheme="mixed", gptq=True, limit_bytes=BUDGET + evaluation_code_bytes())
    module = tiny_module(budget_seconds=2.5, reserve_seconds=1.0)
    trainer = tiny_trainer(
        tmp_path, callbacks=[ExportArtifact(quantization=scheme, calibration_batches=8)], max_steps=-1
    )
    trainer.fit(module, tiny_data(write_data(tmp_path / "data")))
    record = Run.of(trainer).record
    assert record.trained.seconds <= 2.5
    assert "calibrated on 1 of 8 training batches" in caplog.text or "calibrated on 2 of 8" in caplog.text
    assert not any("longer than predicted" in str(w.message) for w in recwarn)
