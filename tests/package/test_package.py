"""A submission's folder: complete, within the limit, and scoring by itself what the run scored."""

import json
import shutil
import subprocess
import sys

import pytest

from hymba_lightning.closure import needed_files
from hymba_lightning.commands import run_command
from hymba_lightning.package import submission
from hymba_lightning.package.submission import SubmissionError, package, run_referee


@pytest.fixture(scope="module")
def run(fitted_run):
    return fitted_run


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "mine"
    return package(str(run), str(out), name="Tiny", author="A", github_id="a", blurb="Small.")


def test_the_folder_scores_itself_as_the_run_did(run, made):
    test = json.loads((run / "test_summary.json").read_text())
    assert made.referee["val_bpb"] == pytest.approx(test["ttt_bpb"], rel=1e-6)
    assert (made.referee["tokens"], made.referee["bytes"]) == (test["tokens"], test["bytes"])
    assert test["ttt_bpb"] != pytest.approx(test["bpb_without_adaptation"], rel=1e-5)  # it did adapt
    assert "the folder's own" in str(made)


def test_its_bytes_are_counted_and_its_files_complete(run, made):
    code = list(made.folder.rglob("*.py"))
    assert made.code_bytes == sum(path.stat().st_size for path in code)
    assert made.artifact_bytes == (run / "artifact.hymba").stat().st_size
    about = json.loads((made.folder / "submission.json").read_text())
    assert about["bytes_total"] == made.artifact_bytes + made.code_bytes < 16_000_000
    assert about["bytes_code"] == made.code_bytes
    assert about["val_bpb"] == json.loads((run / "test_summary.json").read_text())["ttt_bpb"]
    assert (about["author"], about["github_id"], about["name"], about["blurb"]) == ("A", "a", "Tiny", "Small.")
    readme = (made.folder / "README.md").read_text()
    assert f"{about['val_bpb']:.4f}" in readme
    assert f"{about['bytes_total']:,} of 16,000,000" in readme
    assert "step:8 train_loss:" in (made.folder / "train.log").read_text()
    assert (made.folder / "logs" / "config.yaml").is_file()
    assert not list(made.folder.rglob("__pycache__"))


def test_the_code_needs_no_training_package(made):
    """With imports of everything else refused, evaluate.py still starts."""
    block = ("import sys, runpy\n"
             "class No:\n"
             "    def find_spec(self, name, path=None, target=None):\n"
             "        if name.split('.')[0] in ('lightning', 'torchmetrics', 'jsonargparse', 'rich', 'matplotlib'):\n"
             "            raise ImportError(name)\n"
             "sys.meta_path.insert(0, No())\n"
             f"sys.argv = ['evaluate.py', '--help']\nrunpy.run_path({str(made.folder / 'evaluate.py')!r}, "
             "run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-I", "-B", "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tokenizer" in done.stdout
    names = {str(path) for path in needed_files("hymba_lightning.package.referee")}
    assert "hymba_lightning/model/hymba.py" in names
    assert not {name for name in names if "/training/" in name or "/callbacks/" in name or name.endswith("cli.py")}


def test_another_artifact_or_other_code_does_not_pass(run, made, tmp_path):
    data = run.parent / "data"
    folder = tmp_path / "other"
    shutil.copytree(made.folder, folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings["ttt"]["epochs"] = 0
    (folder / "settings.json").write_text(json.dumps(settings))
    plain = run_referee(folder, data, data / "tokenizer.model")["val_bpb"]
    assert plain != pytest.approx(made.run_bpb, rel=1e-5)
    shutil.rmtree(folder / "hymba_lightning" / "quantization")
    with pytest.raises(SubmissionError, match="quantization"):
        run_referee(folder, data, data / "tokenizer.model")


def test_a_score_that_is_not_the_runs_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "run_referee", lambda *_: {"val_bpb": 1.0})
    with pytest.raises(SubmissionError, match=r"scores 1\.000000 bits per byte, the run's test"):
        package(str(run), str(tmp_path / "x"))


def test_too_many_bytes_and_missing_parts_are_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(submission, "LIMIT_BYTES", 1000)
        with pytest.raises(SubmissionError, match="over 1,000"):
            package(str(run), str(tmp_path / "large"), evaluate=False)
    with pytest.raises(FileExistsError, match="choose another folder"):
        package(str(run), str(run))
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "test_summary.json").unlink()
    with pytest.raises(SystemExit, match=r"hymba package: .*run `hymba test"):
        run_command("package", [str(bare), "--out", str(tmp_path / "y")])
    (bare / "artifact.hymba").unlink()
    with pytest.raises(FileNotFoundError, match="let `hymba fit` export it"):
        package(str(bare), str(tmp_path / "z"))
