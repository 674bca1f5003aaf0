"""`hymba export`: the averaged weights of any checkpoint, by any scheme, and one line where that cannot be."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import TOKENIZER, write_data

from hymba_lightning.checkpoints import write_checkpoint
from hymba_lightning.closure import evaluation_code_bytes
from hymba_lightning.commands import run_command
from hymba_lightning.data.prepare import prepare
from hymba_lightning.data.tokenizer import train_tokenizer
from hymba_lightning.errors import is_user_error
from hymba_lightning.files import check_place, write_atomic
from hymba_lightning.package.audit import audit_path
from hymba_lightning.package.export import export
from hymba_lightning.quantization import (
    ArtifactTooLargeError,
    QuantizationConfig,
    load_artifact,
)

SMALL = QuantizationConfig(keep_float_numel=100, zstd_level=3)


@pytest.fixture(scope="module")
def run(fitted_run):
    return fitted_run


@pytest.fixture(scope="module")
def last(run):
    return run / "checkpoints" / "last.ckpt"


def test_a_finished_run_gives_the_artifact_that_fit_wrote(run, last, tmp_path):
    made = export(str(last), str(tmp_path / "a.hymba"))
    again, written = load_artifact(tmp_path / "a.hymba"), load_artifact(run / "artifact.hymba")
    assert again.state_dict.keys() == written.state_dict.keys()
    for name, tensor in written.state_dict.items():
        assert torch.equal(again.state_dict[name], tensor), name
    assert (again.config, again.tokenizer) == (written.config, written.tokenizer)
    assert again.metadata["steps"] == written.metadata["steps"] == 8
    assert again.metadata["seq_len"] == written.metadata["seq_len"]
    assert "averaged weights" in str(made)
    assert made.report.bytes == (tmp_path / "a.hymba").stat().st_size


def test_a_checkpoint_without_averages_gives_its_own_weights(last, tmp_path):
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"] = checkpoint.pop("current_model_state")
    del checkpoint["averaging_state"]
    write_checkpoint(tmp_path / "raw.ckpt", checkpoint)
    lossless = QuantizationConfig(float32_names=[""])
    made = export(str(tmp_path / "raw.ckpt"), str(tmp_path / "a.hymba"), lossless, tokenizer=str(TOKENIZER))
    assert "last-step weights" in str(made)
    stored = load_artifact(tmp_path / "a.hymba").state_dict
    averaged = torch.load(last, weights_only=True)["state_dict"]
    for name, tensor in stored.items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"net.{name}"]), name
    assert any(not torch.equal(tensor, averaged[f"net.{name}"]) for name, tensor in stored.items())


def test_data_calibrates_the_rounding(run, last, tmp_path):
    options = [
        "--ckpt",
        str(last),
        "--scheme",
        "rows",
        "--quantization.keep_float_numel",
        "100",
        "--quantization.bits",
        "4",
    ]
    run_command("export", [*options, "--out", str(tmp_path / "rounded")])
    run_command(
        "export",
        [
            *options,
            "--out",
            str(tmp_path / "calibrated"),
            "--data_dir",
            str(run.parent / "data"),
            "--calibration_batches",
            "3",
        ],
    )
    rounded, calibrated = (load_artifact(tmp_path / name) for name in ("rounded", "calibrated"))
    assert (rounded.quantization["gptq"], calibrated.quantization["gptq"]) == (False, True)
    name = "blocks.0.mlp.fc.weight"
    assert not torch.equal(rounded.state_dict[name], calibrated.state_dict[name])
    assert torch.equal(rounded.state_dict["tok_emb.weight"], calibrated.state_dict["tok_emb.weight"])


@pytest.mark.parametrize(
    "options", [[], ["--data_dir", "data", "--calibration_batches", "2"], ["--data_dir", "data", "--gptq", "false"]]
)
def test_one_number_drives_the_export(run, last, tmp_path, options, capsys):
    options = [str(run.parent / "data") if option == "data" else option for option in options]
    budget = 61_803
    run_command(
        "export",
        ["--ckpt", str(last), "--out", str(tmp_path / "a"), "--limit", str(budget + evaluation_code_bytes()), *options],
    )
    assert 0.99 * budget < (tmp_path / "a").stat().st_size <= budget
    stored = load_artifact(tmp_path / "a")
    assert stored.quantization["scheme"] == "mixed"
    assert stored.quantization["gptq"] == (options[-1:] == ["2"])
    assert "% of " in capsys.readouterr().out


def test_what_is_over_the_limit_is_refused(last, tmp_path):
    with pytest.raises(ArtifactTooLargeError, match="over the limit of 100,000"):
        export(str(last), str(tmp_path / "a"), QuantizationConfig(limit_bytes=100_000))


def test_an_artifact_is_taken_with_a_warning(run, tmp_path, caplog):
    made = export(str(run / "artifact.hymba"), str(tmp_path / "a"))
    assert "rounded already" in caplog.text
    assert load_artifact(made.path).metadata["steps"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bad.ckpt does not exist"),
        (b"not a checkpoint", "bad.ckpt is neither an artifact nor a checkpoint"),
        ({"weights": torch.ones(2)}, "bad.ckpt does not say which network it holds"),
        (
            {"hyper_parameters": {"net": {}}, "state_dict": {"net.tok_emb.weight": torch.ones(2)}},
            "bad.ckpt cannot be loaded: its config has a token table",
        ),
        ({"hyper_parameters": {"net": {"d_modle": 3}}, "state_dict": {}}, "d_modle"),
        ({"hyper_parameters": {"net": {}}}, "bad.ckpt does not say which network it holds"),
    ],
)
def test_files_that_hold_no_network_are_named(tmp_path, content, message, capsys):
    path = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_checkpoint(path, content)
    with pytest.raises((ValueError, OSError)) as error:
        run_command("export", ["--ckpt", str(path), "--out", str(tmp_path / "a")])
    assert is_user_error(error.value)
    assert message in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gptq", "true"], "give --data_dir"),
        (["--calibration_batches", "0"], "calibration_batches=0"),
        (["--scheme", "int3"], "int3"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_be_met_are_named(last, tmp_path, options, message):
    with pytest.raises((ValueError, OSError)) as error:
        run_command("export", ["--ckpt", str(last), "--out", str(tmp_path / "a"), *options])
    assert message in str(error.value)


def test_no_file_takes_the_place_of_a_device(last, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe is a device or a pipe, whose place a file would take: name a file"):
        run_command("export", ["--ckpt", str(last), "--out", str(tmp_path / "pipe")])
    with pytest.raises(OSError, match="is a device or a pipe"):
        write_atomic(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="is a device or a pipe"):
        check_place(Path("/dev/stdout"))


def test_data_of_another_tokenizer_is_refused(last, tmp_path):
    data = write_data(tmp_path / "data")
    # A field that no reader knows: the same pieces, another file.
    (data / "tokenizer.model").write_bytes(TOKENIZER.read_bytes() + b"\xc2\x3e\x00")
    with pytest.raises(ValueError, match="made for another tokenizer"):
        export(str(last), str(tmp_path / "a"), SMALL, data_dir=str(data))
    texts = ["many different words make a tokenizer of their own " * 3, "0123456789 abcdefghijklmnopqrstuvwxyz"] * 40
    (data / "tokenizer.model").write_bytes(train_tokenizer(texts, 300))
    with pytest.raises(ValueError, match=r"300 pieces, but the network's vocab_size is 1024"):
        export(str(last), str(tmp_path / "a"), SMALL, data_dir=str(data))
    assert not (tmp_path / "a").exists()


def test_shards_of_another_tokenizer_do_not_calibrate(run, last, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"some text {n} " * 9}) + "\n" for n in range(60)))
    prepare([str(tmp_path / "a.jsonl")], out=str(tmp_path / "data"), vocab_size=300, val_fraction=0.2, progress=False)
    said = r"sp1024\.model is not the tokenizer that made the shards"
    with pytest.raises(ValueError, match=said):
        export(str(last), str(tmp_path / "a"), SMALL, data_dir=str(tmp_path / "data"), tokenizer=str(TOKENIZER))
    with pytest.raises(ValueError, match=said):
        audit_path(str(run / "artifact.hymba"), str(tmp_path / "data"), tokenizer=str(TOKENIZER))
