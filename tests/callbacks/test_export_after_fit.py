"""The export at the end of a fit with precision solved for: calibrated inside the clock, or without any data."""

import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.quantization import QuantizationConfig, load_artifact
from hymba_lightning.run import Run, RunRecord
from hymba_lightning.run.finish import rehearse

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
            rehearse(trainer, pl_module, self.settings)

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
    assert "model.reserve_seconds holds back 0.0 s of the budget: raise it" in caplog.text
    caplog.clear()
    callback = Rehearsed(quantization=scheme, calibration_batches=2)
    module = tiny_module(budget_seconds=3600, reserve_seconds=600)
    tiny_trainer(tmp_path / "long", callbacks=[callback]).fit(module, tiny_data(data))
    assert "holds back" not in caplog.text
