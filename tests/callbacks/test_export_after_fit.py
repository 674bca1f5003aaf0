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
    module, data = tiny_module(), tiny_data(write_data(tmp_path / "data"))
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
