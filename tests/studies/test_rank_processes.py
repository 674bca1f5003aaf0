"""Ranks in processes of their own: what ends one is told with its number, and none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.multiprocessing as mp

from hymba_lightning.errors import UserError
from hymba_lightning.studies.rank_processes import run_ranks


def fall(rank, how):
    """What a rank does in these tests: the second one ends in its own way, the first would wait for ever."""
    if rank == 0:
        time.sleep(600)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refuses":
        raise UserError("no such thing")
    raise TypeError("a bug")


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("killed", UserError, "^rank 1 was killed by SIGKILL, for its memory maybe"),
        ("refuses", UserError, "^rank 1: no such thing$"),
        ("errs", RuntimeError, "^rank 1 failed: TypeError: a bug$"),
    ],
)
def test_what_ends_a_rank_is_told_in_a_sentence(how, error, text):
    with pytest.raises(error, match=text):
        run_ranks(fall, how, 2)
    assert not mp.active_children()


def rest(rank, seconds):
    time.sleep(seconds)


def test_an_interruption_leaves_no_rank():
    def interrupt():
        while len(mp.active_children()) < 2:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks(rest, 600.0, 2)
    assert not mp.active_children()


def wait(rank, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    time.sleep(600)


START = """
import pathlib, sys
from hymba_lightning.studies.rank_processes import run_ranks
from test_rank_processes import wait
if __name__ == "__main__":
    run_ranks(wait, pathlib.Path(sys.argv[1]), 1)
"""


def test_a_rank_ends_with_what_started_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    starter = subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], env=environment)
    end = time.monotonic() + 60
    while not (tmp_path / "0").exists() or not (tmp_path / "0").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    starter.kill()
    starter.wait()
    rank = int((tmp_path / "0").read_text())
    while time.monotonic() < end:
        try:
            os.kill(rank, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(rank, signal.SIGKILL)
    pytest.fail("the rank is still there")
