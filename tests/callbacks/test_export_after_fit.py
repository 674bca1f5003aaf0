"""The export at the end of a fit with precision solved for: calibrated inside the clock, or without any data."""

import pytest
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.quantization import QuantizationConfig, evaluation_code_bytes, load_artifact

BUDGET = 61_803


@pytest.mark.parametrize("gptq", [False, True])
def test_a_fit_ends_with_an_artifact_that_just_fits(tmp_path, gptq):
    scheme = QuantizationConfig(scheme="mixed", gptq=gptq, limit_bytes=BUDGET + evaluation_code_bytes())
    export = ExportArtifact(quantization=scheme, calibration_batches=2)
    # Trained hard enough for its bytes to fill the limit.
    module = tiny_module(optimizer={"warmup_share": 0, "warmdown_share": 0.4}, ema_decay=0.9)
    data = tiny_data(write_data(tmp_path / "data"))
    asked: list[int] = []
    batches = data.calibration_batches
    data.calibration_batches = lambda n: asked.append(n) or batches(n)
    tiny_trainer(tmp_path, callbacks=[export]).fit(module, data)
    assert asked == ([2] if gptq else [])  # training data is touched only where it counts as training
    size = (tmp_path / "artifact.hymba").stat().st_size
    assert 0.99 * BUDGET < size == export.report.bytes <= BUDGET
    export.check()
    assert load_artifact(tmp_path / "artifact.hymba").quantization["scheme"] == "mixed"
    assert export.stages["artifact"].bpb == pytest.approx(export.stages["ema"].bpb, abs=0.02)
    assert export.stages["artifact"].bpb != export.stages["ema"].bpb


def test_the_rehearsal_before_the_clock_changes_nothing_and_tells_a_short_reserve(tmp_path, caplog):
    class Rehearsed(ExportArtifact):
        def on_train_start(self, trainer, pl_module):  # on a GPU by itself
            self._rehearse(trainer, pl_module)

    scheme = QuantizationConfig(scheme="mixed", gptq=True, limit_bytes=BUDGET + evaluation_code_bytes())
    data = write_data(tmp_path / "data")
    for export in (ExportArtifact, Rehearsed):
        callback = export(filename=f"{export.__name__}.hymba", quantization=scheme, calibration_batches=2)
        module = tiny_module(budget_seconds=3600, optimizer={"warmdown_share": 0})
        tiny_trainer(tmp_path, callbacks=[callback]).fit(module, tiny_data(data))
    plain, rehearsed = (load_artifact(tmp_path / f"{export.__name__}.hymba").state_dict
                        for export in (ExportArtifact, Rehearsed))
    assert all((plain[name] == rehearsed[name]).all() for name in plain)
    assert "model.reserve_seconds holds back 0.0 s of the budget: raise it" in caplog.text
    caplog.clear()
    callback = Rehearsed(quantization=scheme, calibration_batches=2)
    module = tiny_module(budget_seconds=3600, reserve_seconds=600)
    tiny_trainer(tmp_path, callbacks=[callback]).fit(module, tiny_data(data))
    assert "holds back" not in caplog.text
