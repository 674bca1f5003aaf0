"""A folder has one writer: who comes second is told who came first, and a killed owner leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hymba_lightning.claim import LOCK, FolderClaim, FolderInUseError

HOLD = """
import sys, time
from hymba_lightning.claim import FolderClaim
claim = FolderClaim(sys.argv[1], "hymba fit")
claim.take()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_refused_and_told_of_the_first(tmp_path):
    first = FolderClaim(tmp_path / "run", "hymba fit")
    first.take()
    with pytest.raises(FolderInUseError, match=f"in use by hymba fit .process {os.getpid()} on "):
        FolderClaim(tmp_path / "run", "hymba fit").take()
    first.release()
    FolderClaim(tmp_path / "run", "hymba fit").take()


@pytest.mark.parametrize(("what", "why"), [("file", "is a file"), ("link", "is a link to nowhere")])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, what, why):
    path = tmp_path / "run"
    path.touch() if what == "file" else path.symlink_to("nowhere/deep")
    for folder in (path, path / "inner"):
        with pytest.raises(OSError, match=f"cannot be made: {path} {why}"):
            FolderClaim(folder, "hymba fit").take()
    assert os.path.lexists(path)


def test_a_claim_of_another_process_ends_when_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} on "):
            FolderClaim(tmp_path, "hymba fit").take()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(50):  # the kernel closes a killed process's files a moment after its end
        try:
            FolderClaim(tmp_path, "hymba fit").take()
            return
        except FolderInUseError:
            time.sleep(0.1)
    pytest.fail("the claim outlived its process")


def test_an_owner_that_is_written_down_a_moment_later_is_waited_for(tmp_path):
    claim = FolderClaim(tmp_path, "hymba prepare")
    claim.take()
    (tmp_path / ".owner.json").rename(tmp_path / "later")
    threading.Timer(0.1, lambda: (tmp_path / "later").rename(tmp_path / ".owner.json")).start()
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
        FolderClaim(tmp_path, "hymba fit").take()
    claim.release()


def test_a_claim_whose_owner_is_never_written_down_still_refuses(tmp_path):
    claim = FolderClaim(tmp_path, "hymba prepare")
    claim.take()
    for content in ("{", "[" * 100_000):
        (tmp_path / ".owner.json").write_text(content)
        with pytest.raises(FolderInUseError, match="does not say who it is"):
            FolderClaim(tmp_path, "hymba prepare").take()
    absurd = {"work": "x" * 10_000, "pid": -1, "host": "\x1b[2J\n", "since": [1e308]}
    (tmp_path / ".owner.json").write_text(json.dumps(absurd))
    with pytest.raises(FolderInUseError) as refused:
        FolderClaim(tmp_path, "hymba prepare").take()
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600
    assert (tmp_path / LOCK).exists()
    claim.release()


def test_what_a_holder_left_that_was_killed_while_it_said_who_it_is_is_taken_away(tmp_path):
    (tmp_path / "..owner.json._hyfya6g").write_text('{"work": ')
    (tmp_path / "..owner.json.a folder").mkdir()
    (tmp_path / ".owner.json.mine").write_text("kept")
    with FolderClaim(tmp_path, "hymba fit"):
        kept = {".owner.json.mine", "..owner.json.a folder"}
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".owner.json"} | kept
