"""`hymba publish`: the folder of a run → a folder for the hub, with a card that says what the record says."""

import pytest
import torch

from hymba_lightning import Hymba, HymbaConfig, load_network
from hymba_lightning.claim import FolderClaim, FolderInUseError
from hymba_lightning.commands import run_command
from hymba_lightning.files import write_atomic
from hymba_lightning.interop import pretrained
from hymba_lightning.package.publish import publish
from hymba_lightning.report.card import model_card
from hymba_lightning.run.record import RunRecord

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")


def test_a_run_is_published(fitted_run, tmp_path, capsys):
    run_command("publish", [str(fitted_run), "--out", str(tmp_path / "out"), "--weights", "both"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    averaged, _ = load_network(fitted_run / "checkpoints" / "last.ckpt")
    published = Hymba.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in averaged.state_dict().items())
    assert (tmp_path / "out/artifact.hymba").read_bytes() == (fitted_run / "artifact.hymba").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    record = RunRecord.load(fitted_run)
    for stage, score in record.stages().items():
        assert f"| {score.bpb:.4f} | {score.loss:.4f} | {score.tokens:,} |" in card, stage
    assert record.artifact.sha256 in card
    assert record.trained.data.digest in card
    assert str(fitted_run.parent) not in card


def test_a_file_alone_is_published_with_what_is_known(fitted_run, tmp_path):
    publish(str(fitted_run / "artifact.hymba"), str(tmp_path / "of_artifact"), weights="artifact")
    assert not (tmp_path / "of_artifact" / "model.safetensors").exists()
    publish(str(fitted_run / "checkpoints/last.ckpt"), str(tmp_path / "of_checkpoint"), name="A name")
    assert "\n# A name\n" in (tmp_path / "of_checkpoint" / "README.md").read_text()


def test_a_card_of_nothing_known_has_no_scores(tmp_path):
    card = model_card("x\x1b[2J", HymbaConfig(), RunRecord(), tmp_path)
    assert "Scores" not in card
    assert "model-index" not in card
    assert "\x1b" not in card


def test_nothing_of_others_is_overwritten(fitted_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something, and no config\.json"):
        publish(str(fitted_run), str(tmp_path / "mine"))
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        publish(str(fitted_run), str(tmp_path / "mine" / "README.md"))
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    publish(str(fitted_run), str(tmp_path / "out"))
    publish(str(fitted_run), str(tmp_path / "out"))
    with (
        FolderClaim(tmp_path / "out", "hymba publish"),
        pytest.raises(FolderInUseError, match="in use by hymba publish"),
    ):
        publish(str(fitted_run), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint and no artifact"):
        publish(str(tmp_path / "mine"), str(tmp_path / "other"))


def test_a_full_disk_leaves_what_was_published_before_or_nothing(fitted_run, tmp_path, monkeypatch):
    publish(str(fitted_run), str(tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(path, content):
        if path.name == "generation_config.json":
            raise OSError(28, "No space left on device")
        write_atomic(path, content)

    monkeypatch.setattr(pretrained, "write_atomic", full)
    for out in ("out", "new"):
        with pytest.raises(OSError, match="No space left"):
            publish(str(fitted_run), str(tmp_path / out), weights="artifact")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    # A killed one leaves its half of the work, which is none of the user's.
    (tmp_path / "new" / ".publishing").mkdir(parents=True)
    (tmp_path / "new" / ".publishing" / "model.safetensors").write_text("half")
    (tmp_path / "new" / "artifact.hymba").write_text("moved already, without its config")
    publish(str(fitted_run), str(tmp_path / "new"), weights="artifact")
    assert not {".publishing", "model.safetensors"} & {path.name for path in (tmp_path / "new").iterdir()}


def test_without_a_tokenizer_that_of_an_earlier_publish_goes_too(fitted_run, tmp_path):
    out = tmp_path / "out"
    publish(str(fitted_run), str(out))
    assert (out / "tokenizer_config.json").is_file()
    publish(str(fitted_run), str(out), tokenizer="none")
    assert [path.name for path in out.iterdir() if "tokenizer" in path.name] == []
    assert (out / "model.safetensors").is_file()
