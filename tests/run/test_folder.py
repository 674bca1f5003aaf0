"""A run's folder: what may be written there, and what a new run takes away."""

import os

import pytest

from hymba_lightning.checkpoints import write_checkpoint
from hymba_lightning.claim import FolderInUseError
from hymba_lightning.run.folder import RunExistsError, RunFolder
from hymba_lightning.run.record import ArtifactRecord, RunRecord, ScoreRecord


def fill(folder):
    """A finished run with an artifact of its own name, and a file that is not ours."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in (
        "checkpoints/last.ckpt",
        "config.yaml",
        "summary.json",
        "test_summary.json",
        "ttt.png",
        "probe.json",
        "probe.png",
        "small.bin",
        "events.out.tfevents.1",
        "notes.txt",
    ):
        (folder / name).write_text("old")
    RunRecord(artifact=ArtifactRecord("small.bin", "s", 1, 1, 2, {})).save(folder)
    return folder


def test_a_run_is_not_overwritten_unasked(tmp_path):
    folder = fill(tmp_path / "a")
    with pytest.raises(RunExistsError, match=r"already holds a run .*record\.json.*--overwrite true"):
        RunFolder(folder).start()
    assert (folder / "summary.json").read_text() == "old"


def test_another_runs_checkpoint_is_no_leave_to_overwrite(tmp_path):
    own, other = fill(tmp_path / "own"), fill(tmp_path / "other")
    with pytest.raises(RunExistsError, match="another run's checkpoint"):
        RunFolder(own).start(other / "checkpoints" / "last.ckpt")
    RunFolder(own).start(own / "checkpoints" / "last.ckpt")
    assert (own / "summary.json").read_text() == "old"  # it goes on: nothing is taken away
    RunFolder(tmp_path / "new").start(other / "checkpoints" / "last.ckpt")


def test_overwriting_takes_away_all_that_a_run_wrote_and_nothing_else(tmp_path):
    folder = fill(tmp_path / "a")
    run = RunFolder(folder, overwrite=True, loggers=True)
    (folder / "events.out.tfevents.2").write_text("of the new run, whose logger was there first")
    run.start()
    run.settle()
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "events.out.tfevents.2"}


def test_what_came_to_nothing_gives_the_old_run_back(tmp_path):
    folder = fill(tmp_path / "a")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = RunFolder(folder, overwrite=True)
    run.start()
    (folder / "config.yaml").write_text("new")
    (folder / "checkpoints").mkdir()
    run.restore()
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # So does the next owner, where the process was killed in between.
    run.start()
    (folder / "config.yaml").write_text("new")
    RunFolder(folder).claim("hymba test")
    assert {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".lock", ".owner"))
    } == before


def test_a_config_alone_shows_that_a_run_began_there(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(RunExistsError, match=r"config\.yaml"):
        RunFolder(tmp_path).check()
    # Beside the note of an owner who was killed it is of a run that saved nothing.
    (tmp_path / ".owner.json").write_text("{}")
    run = RunFolder(tmp_path)
    run.check()
    run.claim("hymba fit")
    run.start()
    run.restore()
    run.close()
    assert not (tmp_path / "config.yaml").exists(), "this run came to nothing, too"


def test_a_config_written_by_hand_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("# my notes on the rates\nseed_everything: 1\nrun_dir: null\n")
    with pytest.raises(RunExistsError, match=r"already holds a run \(config\.yaml\)"):
        RunFolder(tmp_path).check()


def test_a_run_that_failed_before_it_saved_anything_is_begun_again(tmp_path):
    # A rank that ends because another one died gives its claim back, and leaves no owner's note.
    (tmp_path / "config.yaml").write_text("# lightning.pytorch==2.6.6\nseed_everything: 1\nrun_dir: null\n")
    run = RunFolder(tmp_path)
    run.check()
    run.claim("hymba fit")
    run.start()
    run.settle()
    run.close()
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    "names", [["config.yaml"], ["checkpoints/model.pt"], ["checkpoints/last.ckpt", "summary.json"]]
)
def test_files_of_another_program_are_not_overwritten_even_when_asked(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("learning_rate: 1")
    for overwrite in (False, True):
        folder = RunFolder(tmp_path, overwrite)
        with pytest.raises(RunExistsError, match=r"holds .* that no run of this package wrote: choose another"):
            folder.check()
        folder.claim("hymba fit")
        with pytest.raises(RunExistsError):
            folder.start()
        folder.restore()
        folder.close()
    assert all((tmp_path / name).read_text() == "learning_rate: 1" for name in names)


@pytest.mark.parametrize("sign", ["config.yaml", "checkpoints/last.ckpt", ".owner.json", "artifact.hymba"])
def test_what_is_left_of_a_run_is_known_as_one(tmp_path, sign):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=0-step=1.ckpt").write_text("of a callback of the user's")
    if sign == "checkpoints/last.ckpt":
        write_checkpoint(tmp_path / sign, {"a": 1})
    else:
        (tmp_path / sign).write_text("seed_everything: 1\nrun_dir: null\n")
    run = RunFolder(tmp_path, overwrite=True)
    run.claim("hymba fit")
    run.start()
    run.settle()
    run.close()
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_results_of_tests_are_no_run_and_are_not_lost(tmp_path):
    for name in ("test_config.yaml", "test_summary.json", "validate_config.yaml", "nats.npy"):
        (tmp_path / name).write_text("old")
    RunRecord(scores=[ScoreRecord("ttt", 1.0, 1, 1, None, "w")]).save(tmp_path)
    run = RunFolder(tmp_path)
    run.start()
    (tmp_path / "config.yaml").write_text("new")
    run.restore()
    assert not (tmp_path / "config.yaml").exists()
    run.start()
    run.settle()
    assert (tmp_path / "test_summary.json").read_text() == (tmp_path / "nats.npy").read_text() == "old"


def test_who_writes_is_told_before_what_is_there(tmp_path):
    first = RunFolder(fill(tmp_path / "a"), overwrite=True)
    first.claim("hymba fit")
    with pytest.raises(FolderInUseError, match=rf"in use by hymba fit \(process {os.getpid()} on "):
        RunFolder(tmp_path / "a").check()
    first.close()
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path / "a").check()


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path):
    folder = tmp_path / "deep" / "er"
    run = RunFolder(folder, loggers=True)
    (folder / "mine").mkdir(parents=True)  # by a logger that was there first
    (folder / "mine" / "metrics.csv").write_text("a")
    run.claim("hymba fit")
    run.log_dirs = [folder / "mine"]
    run.start()
    (folder / "config.yaml").write_text("new")
    run.restore()
    run.close()
    assert list(tmp_path.iterdir()) == []
    run.claim("hymba fit")
    (folder / "notes.txt").write_text("somebody's")
    run.close()
    assert (folder / "notes.txt").read_text() == "somebody's"


def test_overwriting_clears_the_folders_that_loggers_were_given_a_name_for(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("old")

    run = RunFolder(tmp_path, loggers=True)
    run.log_dirs = [tmp_path / "mine" / "version_0", tmp_path, tmp_path.parent / "elsewhere"]
    run.start()
    run.settle()
    write("config.yaml", "mine/version_0/metrics.csv", "mine/version_0/notes.txt", "mine/hparams.yaml")
    write("events.out.tfevents.1", "wandb/offline-run-1/files/x", "checkpoints/last.ckpt")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    run = RunFolder(tmp_path, overwrite=True, loggers=True)
    run.start()
    run.restore()
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before
    run.start()
    run.settle()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"mine/version_0/notes.txt", "mine/hparams.yaml"}, "what no logger of the run wrote stays"


def test_one_process_writes_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim("hymba fit")
    first.claim("hymba fit")
    with pytest.raises(FolderInUseError, match="in use by hymba fit"):
        second.claim("hymba test")
    first.close()
    second.claim("hymba test")
