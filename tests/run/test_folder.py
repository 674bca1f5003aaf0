"""A run's folder: what may be written there, and what a new run takes away."""

import pytest

from hymba_lightning.claim import FolderInUseError
from hymba_lightning.run.folder import RunExistsError, RunFolder
from hymba_lightning.run.record import ArtifactRecord, RunRecord


def fill(folder):
    """A finished run with an artifact of its own name, and a file that is not ours."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in (
        "checkpoints/last.ckpt",
        "config.yaml",
        "summary.json",
        "test_summary.json",
        "ttt.png",
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


def test_one_process_writes_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim("hymba fit")
    first.claim("hymba fit")
    with pytest.raises(FolderInUseError, match="in use by hymba fit"):
        second.claim("hymba test")
    first.close()
    second.claim("hymba test")
