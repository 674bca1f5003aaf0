"""`hymba fit --start_from`: fine-tuning begins with the weights that are named, and with a clock of its own."""

import dataclasses
import json
from pathlib import Path

import official_statement as statement
import pytest
import torch
import yaml
from fit_process import finish, start
from tiny import TOKENIZER

from hymba_lightning.data.tokenizer import train_tokenizer
from hymba_lightning.generation import load_network
from hymba_lightning.generation.loading import began_elsewhere
from hymba_lightning.interop import official
from hymba_lightning.run.record import RunRecord
from hymba_lightning.training.optim_config import OptimizerConfig


def fit(fitted_run, run, *options, data=None):
    """Options of a fit of one step that changes next to nothing, on the fitted run's data."""
    names = [
        field.name
        for field in dataclasses.fields(OptimizerConfig)
        if field.name.endswith("_lr") and field.name != "decay_with_lr"
    ]
    rates = [f"--model.optimizer.{name}=1e-9" for name in names]
    config = ["--config", str(fitted_run.parent / "tiny.yaml"), "--run_dir", str(run)]
    more = [] if data is None else ["--data.data_dir", str(data)]
    steps = ["--trainer.max_steps", "1", "--model.net.d_model", "64"]
    return ["fit", *config, *steps, *rates, *more, *options]


def test_a_fit_starts_from_any_of_our_files(fitted_run, tmp_path):
    starts = {"artifact": fitted_run / "artifact.hymba", "checkpoint": fitted_run / "checkpoints" / "last.ckpt"}
    processes = [
        start(fit(fitted_run, tmp_path / name, "--start_from", str(path)), tmp_path / f"{name}.log")
        for name, path in starts.items()
    ]
    assert finish(processes) == [0, 0], (tmp_path / "artifact.log").read_text()
    for name, path in starts.items():
        expected, _ = load_network(path)
        got, _ = load_network(tmp_path / name / "checkpoints" / "last.ckpt")
        # The weights' own architecture, not the command line's.
        assert got.config == expected.config
        for key, value in expected.state_dict().items():
            assert torch.allclose(got.state_dict()[key], value, atol=1e-5), key
        assert RunRecord.load(tmp_path / name).trained.steps == 1
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert (config["start_from"], config["model"]["net"]["d_model"]) == (str(path), 32)


def test_another_tokenizers_weights_are_refused(fitted_run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for shard in (fitted_run.parent / "data").glob("*.bin"):
        (data / shard.name).write_bytes(shard.read_bytes())
    (data / "tokenizer.model").write_bytes(train_tokenizer(["some words of text, more of them\n"] * 300, 290))
    assert TOKENIZER.read_bytes() != (data / "tokenizer.model").read_bytes()
    arguments = fit(fitted_run, tmp_path / "run", "--start_from", str(fitted_run / "artifact.hymba"), data=data)
    assert finish([start(arguments, tmp_path / "log")]) == [2]
    assert "tokenizer" in (tmp_path / "log").read_text()


def test_a_run_that_goes_on_did_start_there_or_is_refused(fitted_run, tmp_path):
    begun, other = tmp_path / "begun", tmp_path / "other.hymba"
    artifact = fitted_run / "artifact.hymba"
    other.write_bytes(artifact.read_bytes())
    first = fit(fitted_run, begun, "--start_from", str(artifact))
    assert finish([start(first, tmp_path / "log")]) == [0], (tmp_path / "log").read_text()
    on = ["--ckpt_path", "last", "--trainer.max_steps", "2"]
    assert finish([start([*fit(fitted_run, begun, "--start_from", str(other)), *on], tmp_path / "log")]) == [2]
    assert (
        f"goes on with a run that did not start from {other}: leave out --start_from" in (tmp_path / "log").read_text()
    )
    # Where it began stays known when it goes on without a word of that.
    plain = [*fit(fitted_run, begun, "--model.net.d_model", "32"), *on]
    assert finish([start(plain, tmp_path / "log")]) == [0], (tmp_path / "log").read_text()
    on[-1] = "3"
    assert finish([start([*first, *on], tmp_path / "log")]) == [0], (tmp_path / "log").read_text()
    assert RunRecord.load(begun).trained.steps == 3


@pytest.mark.parametrize(
    ("said", "given", "other"),
    [
        ("a.hymba", "./a.hymba", False),
        ("a.hymba", "{here}/a.hymba", False),
        ("there/a.hymba", "a.hymba", False),
        (None, "a.hymba", False),
        ("b.hymba", "a.hymba", True),
        ("null", "a.hymba", True),
        ("hf:ours/a.hymba", "hf:ours/a.hymba", False),
        ("hf:ours/a.hymba", "hf:theirs/a.hymba", True),
        ("hf:ours/a.hymba", "a.hymba", True),
        ("x\n- damaged", "a.hymba", False),
    ],
)
def test_a_start_is_another_only_where_the_run_says_so(tmp_path, monkeypatch, said, given, other):
    monkeypatch.chdir(tmp_path)
    for name in ("a.hymba", "b.hymba"):
        Path(name).touch()
    if said is not None:
        Path("config.yaml").write_text(f"start_from: {said}\n")
    Path("elsewhere").mkdir()
    Path("elsewhere/config.yaml").write_text("- no mapping\n")
    assert not began_elsewhere("elsewhere/last.ckpt", "a.hymba")
    assert began_elsewhere("last.ckpt", given.format(here=tmp_path)) is other


def test_a_missing_start_is_one_sentence(fitted_run, tmp_path):
    assert finish([start(fit(fitted_run, tmp_path / "run", "--start_from", "nowhere"), tmp_path / "log")]) == [2]
    assert (tmp_path / "log").read_text().strip().endswith("a checkpoint or a folder of save_pretrained")
    assert not (tmp_path / "run").exists()


def test_a_released_hymba_of_the_same_vocabulary_is_fine_tuned(fitted_run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    released = statement.SMALL | {"vocab_size": 1024, "num_hidden_layers": 3, "kv_reuse_group": [[1, 2]]}
    released |= {"global_attn_idx": [0]}
    (tmp_path / "config.json").write_text(json.dumps(released))
    safetensors.save_file(statement.random_weights(released), tmp_path / "model.safetensors")
    run = tmp_path / "run"
    more = ["--model.optimizer.matrix_lr", "0.01", "--trainer.max_steps", "6", "--export.enabled", "true"]
    assert finish([start(fit(fitted_run, run, "--start_from", str(tmp_path)), tmp_path / "refused")]) == [2]
    assert "save the network with it" in (tmp_path / "refused").read_text()
    named = official.from_hf(tmp_path).save_pretrained(tmp_path / "named", tokenizer=TOKENIZER)
    arguments = fit(fitted_run, run, "--start_from", str(named), *more)
    assert finish([start(arguments, tmp_path / "log")]) == [0], (tmp_path / "log").read_text()
    got, _ = load_network(run / "artifact.hymba")
    before = load_network(tmp_path)[0]
    assert got.config == before.config
    assert RunRecord.load(run).trained.steps == 6
    # It goes out as it came in.
    out = official.from_hf(official.to_hf(got, tmp_path / "out"))
    tokens = torch.arange(300, 340)[None]
    with torch.no_grad():
        assert torch.equal(out(tokens), got(tokens))
        assert got(tokens[:, :-1], tokens[:, 1:]) < before(tokens[:, :-1], tokens[:, 1:])
