"""The study of bytes against loss: every scheme written, read back and compared on the same tokens."""

import json

import numpy as np
import pytest
import torch
from tiny import NET, tiny_data, write_data

from hymba_lightning.model import Hymba, HymbaConfig
from hymba_lightning.quantization import QuantizationConfig
from hymba_lightning.quantization.schemes import calibrate
from hymba_lightning.studies.quantization import REFERENCE, compare, entropy_bytes, recipes, run_study

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Hymba(HymbaConfig(**NET | {"bigram_buckets": 8448}))  # one matrix that the reference, too, would quantize
    with torch.no_grad():
        for parameter in net.bigram_hash.parameters():
            parameter.normal_(std=0.5)
    return net.eval()


@pytest.mark.more
def test_every_recipe_is_written_scored_and_not_run_again(net, tmp_path):
    data = tiny_data(write_data(tmp_path / "data"))
    batches = [batch.inputs for batch in data.calibration_batches(2)]
    calibration = calibrate(net, QuantizationConfig(scheme="mixed", gptq=True), batches)
    first = run_study(net, data, calibration, tmp_path, CPU, only=["mixed"])
    assert "| int6, rounded |" not in first
    text = run_study(net, data, calibration, tmp_path, CPU)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {recipe.name for recipe in recipes()} == set(results)
    assert all(
        result["tokens"] == 699 and result["bytes"] == (tmp_path / result["file"]).stat().st_size
        for result in results.values()
    )
    assert results["int8, rounded"]["kl"] < 0.2 * results["int5, rounded"]["kl"]
    assert results["mixed, 100% of the reference's bytes"]["bytes"] <= results[REFERENCE]["bytes"]
    for result in results.values():
        for coder, size in result.get("coders", {}).items():
            assert size > 0.8 * result["coders"]["entropy, order 0"], coder
    assert text == (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for file in tmp_path.glob("*.hymba"):
        file.unlink()
    assert run_study(net, data, calibration, tmp_path, CPU) == text
    with pytest.raises(ValueError, match=r"results of something else \(validation text \w+, now \w+\)"):
        run_study(net, tiny_data(write_data(tmp_path / "more", n_val=800)), calibration, tmp_path, CPU)


def test_a_network_is_no_distance_from_itself_and_some_from_another(net, tmp_path):
    data = tiny_data(write_data(tmp_path / "data"))
    same = compare(net, net, data.val_dataloader(), CPU)
    assert (same["gap"], same["kl"]) == (0, 0)
    other = Hymba(net.config).eval()
    other.load_state_dict({name: tensor + 0.01 for name, tensor in net.state_dict().items()})
    moved = compare(net, other, data.val_dataloader(), CPU)
    assert moved["kl"] > 0
    assert moved["gap"] == pytest.approx(moved["bpb"] - moved["float_bpb"])


def test_entropy_is_counted_between_cuts():
    content = np.tile(np.arange(16, dtype=np.uint8), 100).tobytes() + bytes(1000)
    assert entropy_bytes(content, [1600]) == 800  # 4 bits each, then nothing
    assert entropy_bytes(content, []) > 1000
