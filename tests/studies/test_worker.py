"""A study's process: one for many runs, a new one after a failure, each run's output in its own log."""

import signal
import threading

from hymba_lightning.studies.worker import Worker


def test_runs_share_a_process_until_one_fails(tmp_path):
    worker = Worker({"HYMBA_TEST_VARIABLE": "1"})
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    try:
        assert worker.run(["--help"], logs[0]) == 0
        first = worker._process.pid
        assert worker.run(["fit", "--help"], logs[1]) == 0
        assert worker._process.pid == first
        assert worker.run(["inspect", str(tmp_path / "missing.hymba")], logs[2]) != 0
        assert worker.run(["--help"], logs[3]) == 0
        assert worker._process.pid != first
    finally:
        worker.close()
    assert "usage: hymba <command>" in logs[0].read_text()
    assert "--model.net.window" in logs[1].read_text()
    assert "missing.hymba" in logs[2].read_text()
    assert logs[3].read_text() == logs[0].read_text()


def test_a_process_that_dies_is_a_failed_run(tmp_path):
    worker = Worker()
    try:
        assert worker.run(["--help"], tmp_path / "a.log") == 0
        worker._process.kill()
        worker._process.wait()
        assert worker.run(["--help"], tmp_path / "b.log") != 0
        assert worker.run(["--help"], tmp_path / "c.log") == 0
    finally:
        worker.close()


def test_a_run_that_is_told_to_stop_ends_its_process(tmp_path):
    """By a signal that `hymba` answers with what it has saved."""
    worker = Worker()
    assert worker.run(["--help"], tmp_path / "a.log") == 0
    process = worker._process
    threading.Timer(0.2, worker.stop).start()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert worker.run(["--help"], tmp_path / "b.log") != 0
    worker.stop()  # with nothing to stop
