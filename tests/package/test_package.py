"""A submission's folder: complete, within the limit, and scoring by itself what the run scored."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from code_archive import rewrite_code
from fitted import without_native_loops

from hymba_lightning import closure
from hymba_lightning.closure import evaluation_archive, evaluation_code_bytes, needed_files
from hymba_lightning.commands import run_command
from hymba_lightning.package import submission
from hymba_lightning.package.digests import DigestError, verify_count, verify_folder
from hymba_lightning.package.submission import SubmissionError, package, run_referee
from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact
from hymba_lightning.run.record import RunRecord


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
    code = [made.folder / "evaluate.py", made.folder / "code.tar.xz"]
    assert list(made.folder.rglob("*.py")) == code[:1]
    assert made.code_bytes == sum(path.stat().st_size for path in code) == evaluation_code_bytes()
    assert json.loads((run / "record.json").read_text())["artifact"]["code_bytes"] == made.code_bytes
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
    block = (
        "import sys, runpy\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('lightning', 'torchmetrics', 'jsonargparse', 'rich', 'matplotlib'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        f"sys.argv = ['evaluate.py', '--help']\nrunpy.run_path({str(made.folder / 'evaluate.py')!r}, "
        "run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-B", "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tokenizer" in done.stdout
    names = {str(path) for path in needed_files("hymba_lightning.package.referee")}
    assert "hymba_lightning/model/hymba.py" in names
    assert not {name for name in names if "/training/" in name or "/callbacks/" in name or name.endswith("cli.py")}


def test_the_code_is_plain_sources_in_an_archive_that_is_the_same_each_time(made):
    with tarfile.open(made.folder / closure.ARCHIVE) as archive:
        text = archive.extractfile("hymba_lightning/package/referee.py").read().decode()
    assert "def evaluate(folder: Path" in text
    evaluation_archive.cache_clear()
    assert evaluation_archive() == (made.folder / closure.ARCHIVE).read_bytes()
    sources = sum(
        (closure.ROOT.parent / file).stat().st_size
        for file in needed_files(closure.REFEREE, "hymba_lightning.model.mixers.mamba")
    )
    assert len(evaluation_archive()) < 0.3 * sources


def change_settings(**values):
    def change(folder):
        settings = json.loads((folder / "settings.json").read_text())
        (folder / "settings.json").write_text(json.dumps(settings | values))

    return change


def exchange_artifact(folder):
    """By another valid one, of the same network."""
    artifact = load_artifact(folder / "artifact.hymba")
    weights = {name: tensor * 0.5 for name, tensor in artifact.state_dict.items()}
    save_artifact(
        folder / "artifact.hymba",
        weights,
        config=artifact.config,
        tokenizer=artifact.tokenizer,
        metadata=artifact.metadata,
        scheme=QuantizationConfig(scheme="int6", gptq=False, zstd_level=3),
    )


def halve_nats(folder):
    half = "return 0.5 * bits_per_byte(self.nats"
    rewrite_code(folder, lambda name, text: text.replace("return bits_per_byte(self.nats", half))


def drop_a_module(folder):
    rewrite_code(folder, lambda name, text: None if name.endswith("evaluation/score.py") else text)


def admit_the_change(folder):
    """The new digest in digests.json, the old one of all code in submission.json."""
    halve_nats(folder)
    digests = json.loads((folder / "digests.json").read_text())
    name = "code.tar.xz"
    digests["code"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "digests.json").write_text(json.dumps(digests))


def change_submission(**values):
    def change(folder):
        about = json.loads((folder / "submission.json").read_text())
        (folder / "submission.json").write_text(json.dumps(about | values))

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (exchange_artifact, r"artifact\.hymba"),
        (halve_nats, r"code\.tar\.xz"),
        (admit_the_change, "digests of the code"),
        (change_settings(val_tokens_limit=100), r"settings\.json"),
        (change_settings(val_files="*_train_*.bin"), r"settings\.json"),
        (lambda folder: (folder / "torch.py").write_text(""), r"torch\.py in .* was not packaged"),
        (lambda folder: (folder / "numpy").symlink_to("/"), r"numpy in .* is a link"),
        (lambda folder: (folder / "digests.json").unlink(), r"digests\.json is missing"),
        (lambda folder: (folder / "digests.json").write_text("[]"), r"digests\.json is damaged"),
        (lambda folder: (folder / "submission.json").write_text("{}"), r"submission\.json .* is damaged"),
        (drop_a_module, r"code\.tar\.xz in .* is not what was packaged"),
        (lambda folder: (folder / "code.tar.xz").unlink(), r"code\.tar\.xz is missing"),
        (lambda folder: (folder / "cache.npz").write_bytes(bytes(9)), r"cache\.npz in .* was not packaged"),
        (lambda folder: (folder / "logs" / "more.txt").write_text(""), r"logs/more\.txt in .* was not packaged"),
        (lambda folder: os.mkfifo(folder / "pipe"), r"pipe in .* was not packaged"),
        (lambda folder: (folder / "train.log").write_text("step:9"), r"train\.log in .* is not what was packaged"),
        (lambda folder: (folder / "logs" / "record.json").unlink(), r"logs/record\.json is missing"),
        (change_submission(bytes_total=1000), r"submission\.json in .* says 1000 bytes"),
        (lambda folder: (folder / "digests.json").write_text("[" * 100_000), r"digests\.json is damaged"),
    ],
    ids=[
        "artifact",
        "code",
        "code and digest",
        "fewer tokens",
        "training shards",
        "code beside",
        "code behind a link",
        "no digests",
        "list",
        "no submission",
        "a module less",
        "missing code",
        "a cache beside",
        "another log",
        "a pipe",
        "the history",
        "a log less",
        "fewer bytes",
        "deep digests",
    ],
)
def test_a_folder_that_was_changed_is_refused_by_name(run, made, tmp_path, change, named):
    data, folder = run.parent / "data", tmp_path / "other"
    shutil.copytree(made.folder, folder)
    change(folder)
    with pytest.raises(SubmissionError, match=named):
        run_referee(folder, data, data / "tokenizer.model")
    # By itself too, before anything is scored.
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "evaluate.py"), "--data", str(data)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "val_bpb" not in done.stdout


@pytest.mark.parametrize("module", ["tarfile", "json", "hashlib", "hymba_lightning", "torch", "sitecustomize"])
def test_a_module_beside_evaluate_takes_no_librarys_place(run, made, tmp_path, module):
    folder = tmp_path / "other"
    shutil.copytree(made.folder, folder)
    (folder / f"{module}.py").write_text("import sys; print('val_bpb 0.1'); sys.exit(0)")
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--data", str(run.parent / "data")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"evaluate.py: {module}.py in {folder} was not packaged, and has no digest: delete it\n"
    assert not done.stdout


def test_a_score_that_is_claimed_and_not_scored_is_refused(run, tmp_path):
    folder, data = tmp_path / "other", run.parent / "data"
    package(str(without_native_loops(run, tmp_path / "run")), str(folder), evaluate=False)
    change_submission(val_bpb=1.0)(folder)
    with pytest.raises(
        SubmissionError, match=r"submission\.json in .* claims 1\.0 bits per byte, and the folder scores"
    ):
        run_referee(folder, data, data / "tokenizer.model")
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "evaluate.py"), "--data", str(data)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("evaluate.py: submission.json in ")
    assert "Traceback" not in done.stderr


def test_other_validation_data_are_refused(run, made, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(run.parent / "data", data)
    shutil.copy(data / "tiny_train_000000.bin", data / "tiny_val_000000.bin")
    with pytest.raises(SubmissionError, match=r"the validation data \(tiny_val_000000\.bin in .*\) are not those"):
        run_referee(made.folder, data, data / "tokenizer.model")


def test_another_count_of_tokens_is_refused(made):
    digests = verify_folder(made.folder)
    verify_count(digests, 699, 2270)
    with pytest.raises(DigestError, match=r"100 tokens of 300 bytes were scored, and 699 of 2,270"):
        verify_count(digests, 100, 300)


def test_the_digests_are_those_of_the_run(run, made):
    about = json.loads((made.folder / "submission.json").read_text())
    record = RunRecord.load(run)
    assert about["status"] == "verified"
    assert about["digests"]["artifact"] == record.artifact.sha256
    assert about["digests"]["data"] == record.tested().data.digest
    assert about["digests"]["tokenizer"] == record.tested().data.tokenizer
    readme = (made.folder / "README.md").read_text()
    assert all(digest in readme for digest in about["digests"].values())
    assert "Verified" in readme


def test_what_was_not_scored_is_marked(run, tmp_path):
    made = package(str(run), str(tmp_path / "x"), evaluate=False)
    assert json.loads((made.folder / "submission.json").read_text())["status"] == "unverified"
    assert "**Unverified**" in (made.folder / "README.md").read_text()
    assert "unverified" in str(made)


def forge_summary(run):
    test = json.loads((run / "test_summary.json").read_text())
    (run / "test_summary.json").write_text(json.dumps(test | {"ttt_bpb": 1.0}))


def forge_artifact(run):
    exchange_artifact(run)


def forge_record(run):
    """The score of other weights in the place of the artifact's."""
    record = RunRecord.load(run)
    record.scores = [
        dataclasses.replace(score, nats=100.0, weights="0" * 64) if score.stage == "ttt" else score
        for score in record.scores
    ]
    record.save(run)


def forget_record(run):
    (run / "record.json").unlink()


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (forge_summary, r"test_summary\.json says 1\.0 bits per byte, record\.json 2\."),
        (forge_artifact, "is not the artifact that the fit exported"),
        (forge_record, "was of other weights"),
        (forget_record, r"no score of its artifact in record\.json"),
    ],
)
def test_a_forged_score_is_refused_without_evaluation(run, tmp_path, forge, message):
    forged = tmp_path / "run"
    shutil.copytree(run, forged)
    forge(forged)
    with pytest.raises((SubmissionError, FileNotFoundError), match=message):
        package(str(forged), str(tmp_path / "x"), evaluate=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_logs_and_readme_say_nothing_of_this_machines_folders(run, tmp_path):
    home = tmp_path / "home" / "alice b" / "runs" / "mine"
    shutil.copytree(run, home)
    (home / "fit.log").write_text(
        f"hymba fit --run_dir {home} --data.data_dir /home/alice/data\n"
        "3.2 bits / byte, https://example.org/home/x\nread ~alice/tokenizer.model, "
        "'../../alice/x.bin' file:///home/alice/mlruns\n"
    )
    config = (home / "config.yaml").read_text()
    (home / "config.yaml").write_text(config.replace("run_dir: ", "elsewhere: /home/alice/a b/c.model\nrun_dir: ", 1))
    made = package(str(home), str(tmp_path / "x"), evaluate=False)
    texts = {
        path: path.read_text() for path in made.folder.rglob("*") if path.suffix in (".json", ".yaml", ".md", ".log")
    }
    assert len(texts) > 8
    for path, text in texts.items():
        assert "alice" not in text, path
        assert str(run.parent) not in text, path
        assert str(tmp_path) not in text, path
    log = (made.folder / "logs" / "fit.log").read_text().splitlines()
    assert log == [
        "hymba fit --run_dir mine --data.data_dir data",
        "3.2 bits / byte, https://example.org/home/x",
        "read tokenizer.model, 'x.bin' mlruns",
    ]
    shown = yaml.safe_load((made.folder / "logs" / "config.yaml").read_text())
    assert shown["elsewhere"] == "c.model"
    assert shown["data"]["data_dir"] == "data"


def test_a_score_that_is_not_the_runs_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "run_referee", lambda *_: {"val_bpb": 1.0})
    with pytest.raises(SubmissionError, match=r"scores 1\.000000 bits per byte, the run's test"):
        package(str(run), str(tmp_path / "x"))
    monkeypatch.setattr(submission, "run_referee", lambda *_: {"val_bpb": math.nan})
    with pytest.raises(SubmissionError, match="scores nan"):
        package(str(run), str(tmp_path / "x"))
    # Nothing of a failed packaging stays behind.
    assert list(tmp_path.iterdir()) == []


def test_too_many_bytes_and_missing_parts_are_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(submission, "LIMIT_BYTES", 1000)
        with pytest.raises(SubmissionError, match="over 1,000"):
            package(str(run), str(tmp_path / "large"), evaluate=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileExistsError, match="choose another folder"):
        package(str(run), str(run))
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    for name in ("test_summary.json", "record.json"):
        (bare / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"run `hymba test"):
        run_command("package", [str(bare), "--out", str(tmp_path / "y")])
    (bare / "artifact.hymba").unlink()
    with pytest.raises(FileNotFoundError, match="let `hymba fit` export it"):
        package(str(bare), str(tmp_path / "z"))
