"""Where the wall clock went: every second is in one phase, and a run that goes on keeps what was counted."""

import json
import time

import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.quantization import QuantizationConfig
from hymba_lightning.run import Run
from hymba_lightning.run import finish as finish_module
from hymba_lightning.run.phases import PHASES, Phases


class Time:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_each_second_belongs_to_the_innermost_phase():
    clock = Time()
    phases = Phases(95.0, clock)
    clock.pass_(1)
    phases.move(4, "data")
    phases.begin("training")
    clock.pass_(10)
    with phases.inside("validation"):
        clock.pass_(3)
        with phases.inside("checkpoints"):
            clock.pass_(2)
    clock.pass_(5)
    phases.begin("export")
    phases.leave()  # what was never entered cannot be left
    clock.pass_(7)
    seconds = phases.seconds()
    assert seconds == {"start": 2, "data": 4, "training": 15, "validation": 3, "checkpoints": 2, "export": 7}
    assert sum(seconds.values()) == clock.now - 95.0
    phases.add({"training": 100.0, "export": 1.0, "of another version": 5.0})
    assert phases.seconds() == seconds | {"training": 115, "export": 8}


def fit(folder, data, **options):
    """A run on a clock with a long start, which ends with an artifact; returns its summary and its run."""
    export = ExportArtifact(quantization=QuantizationConfig(gptq=True), calibration_batches=2)
    callbacks = [TrainingCheckpoint(), export, RunSummary(plots=False)]
    trainer = tiny_trainer(folder, val_check_interval=3, enable_checkpointing=True, callbacks=callbacks, **options)
    Run.of(trainer).command_started = time.monotonic() - 50
    ckpt_path = folder / "checkpoints" / "last.ckpt"
    trainer.fit(tiny_module(), tiny_data(data), ckpt_path=ckpt_path if ckpt_path.is_file() else None)
    return json.loads((folder / "summary.json").read_text()), Run.of(trainer)


@pytest.mark.parametrize(("share", "passes"), [(0.0, 2), (0.5, 3)])
def test_an_average_that_ends_as_the_last_weights_is_not_scored_again(tmp_path, monkeypatch, share, passes):
    seen = []
    score = finish_module.score_batches
    monkeypatch.setattr(finish_module, "score_batches", lambda *args: seen.append(1) or score(*args))
    module = tiny_module(ema_decay=share)
    trainer = tiny_trainer(tmp_path / "run", max_steps=3, limit_val_batches=1, callbacks=[ExportArtifact()])
    trainer.fit(module, tiny_data(write_data(tmp_path / "data")))
    stages = Run.of(trainer).record.stages()
    assert len(seen) == passes
    assert (
        (stages["raw"].weights == stages["ema"].weights) == (stages["raw"].nats == stages["ema"].nats) == (passes < 3)
    )


def test_a_summary_says_where_all_of_the_wall_clock_went(tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(
        finish_module,
        "score_batches",
        lambda *args, score=finish_module.score_batches: passes.append(1) or score(*args),
    )
    data = write_data(tmp_path / "data")
    started = time.monotonic()
    summary, run = fit(tmp_path / "run", data, max_steps=6)
    took = 50 + time.monotonic() - started
    phases = summary["phases"]
    assert list(phases) == list(PHASES)
    assert all(seconds > 0 for seconds in phases.values())
    assert phases["start"] >= 50
    assert sum(phases.values()) == pytest.approx(summary["wall_clock_seconds"])
    assert took - 1 < summary["wall_clock_seconds"] <= took
    assert phases["training"] == pytest.approx(summary["train_seconds"] - phases["calibration"], abs=0.5)
    # The average was validated after the last step: raw weights and the artifact are what is left to score.
    assert len(passes) == 2
    assert len(run.record.stages()) == 3
    again, _ = fit(tmp_path / "run", data, max_steps=7)
    assert again["phases"]["start"] >= 100
    assert again["phases"]["training"] > phases["training"]
