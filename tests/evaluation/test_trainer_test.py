"""`trainer.test` with the run's summary: every mode, what it writes, and a module given back as it was."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tiny import tiny_data, tiny_module, tiny_trainer, write_data

from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.evaluation import TTTConfig
from hymba_lightning.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("test") / "data")


def run_test(folder, out, ttt, **summary):
    """Tests an untrained tiny network; returns the module and test_summary.json's content."""
    module = tiny_module(ttt=TTTConfig(**ttt))
    with torch.no_grad():
        for parameter in module.net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    (out / "weights.bin").parent.mkdir(parents=True, exist_ok=True)
    (out / "weights.bin").write_bytes(b"stands for an artifact")
    logger = TensorBoardLogger(str(out), name="", version="")
    trainer = tiny_trainer(out, logger=logger, callbacks=[RunSummary(**summary)])
    Run.of(trainer).weights_from = out / "weights.bin"
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trainer.test(module, tiny_data(folder), verbose=False)
    for name, parameter in module.net.named_parameters():
        assert torch.equal(parameter, before[name]), name
    return module, json.loads((out / "test_summary.json").read_text())


def test_a_last_chunk_of_which_nothing_is_kept_is_no_score(tmp_path):
    data = write_data(tmp_path / "data", n_val=600)
    _, summary = run_test(
        data, tmp_path / "run", {"mode": "cold", "epochs": 1, "freeze_blocks": 0, "drop_partial": True}
    )
    assert (summary["tokens"], summary["chunks"], len(summary["chunk_bpb"])) == (576, 4, 3)
    assert (tmp_path / "run" / "ttt.png").exists()


def test_a_text_of_which_nothing_is_kept_is_refused(tmp_path):
    data = write_data(tmp_path / "data", n_val=60)
    with pytest.raises(ValueError, match=r"drop_partial leaves nothing of a chunk of 59 tokens.*set it to false"):
        run_test(data, tmp_path / "run", {"mode": "cold", "epochs": 1, "freeze_blocks": 0, "drop_partial": True})


@pytest.mark.parametrize(
    "ttt",
    [
        {"mode": "cold", "epochs": 1, "freeze_blocks": 0},
        {"mode": "sliding", "stride": 32, "epochs": 0},
        {"mode": "carried", "warm_tokens": 64, "epochs": 1, "freeze_blocks": 0, "state_after_update": "rewarm"},
        {"mode": "carried", "epochs": 1, "parameters": "low_rank", "freeze_blocks": 0, "lr": 0.1},
    ],
    ids=lambda ttt: f"{ttt['mode']}-{ttt.get('parameters', 'all')}",
)
def test_what_test_writes(folder, tmp_path, ttt):
    _, summary = run_test(folder, tmp_path, ttt, per_token_nats=True)
    nats = np.load(tmp_path / "nats.npy").astype(np.float64)
    assert nats.size == summary["tokens"] == 699
    assert summary["ttt_bpb"] == pytest.approx(nats.sum() / (math.log(2) * summary["bytes"]), rel=1e-6)
    assert summary["nats"] == pytest.approx(nats.sum(), rel=1e-6)
    assert summary["mode"] == ttt["mode"]
    assert summary["weights_sha256"] == hashlib.sha256(b"stands for an artifact").hexdigest()
    assert summary["epochs_done"] == [ttt["epochs"]] * 3 + [0]
    assert {name: summary["ttt"][name] for name in ttt} == ttt
    assert summary["chunk_tokens"] == 192
    assert summary["limit_seconds"] == 600
    assert 0 < summary["scoring_seconds"] + summary["training_seconds"] <= summary["seconds"]
    assert summary["scored_tokens_per_s"] > 0
    assert (summary["update_ms"] is None) == (ttt["epochs"] == 0)
    for curve in ("bpb_by_context", "bpb_by_document_position"):
        assert sum(point["n_tokens"] for point in summary[curve]) == 699
    most = max(point["at_least"] for point in summary["bpb_by_context"])
    assert most == (
        512 if ttt["mode"] == "carried" and "state_after_update" not in ttt else 256 if ttt["mode"] == "carried" else 64
    )
    assert (tmp_path / "ttt.png").stat().st_size > 10_000
    # One sequence of short documents has no context that stands in four texts.
    assert (tmp_path / "context.png").is_file() == (ttt["mode"] != "carried")


def test_tensorboard_has_the_curves(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, summary = run_test(folder, tmp_path, {"epochs": 0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("val_ttt/running_bpb")[-1].value == pytest.approx(summary["ttt_bpb"], rel=1e-6)
    assert events.Scalars("val_final/ttt_bpb")[-1].value == pytest.approx(summary["ttt_bpb"], rel=1e-6)
    # A curve over contexts is no course over steps, which TensorBoard would smooth: it is a picture.
    assert not any("context" in tag for tag in events.Tags()["scalars"])
    (picture,) = events.Images("what_context_is_worth/context")
    assert (picture.width, picture.height) == Image.open(tmp_path / "context.png").size
    assert not (tmp_path / "nats.npy").exists()


def test_one_chunks_nats_are_kept_at_a_time(folder, tmp_path):
    module, _ = run_test(folder, tmp_path, {"epochs": 0})
    assert module.testing.chunk.nats.numel() == 699 - 3 * 192
    assert len(module.testing.scores) == 4
