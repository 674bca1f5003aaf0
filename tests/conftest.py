"""Shared by all tests: one thread, signals as in a terminal, shared modules on the path."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hymba_lightning.signals import HANDLED

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore these, and with them every process that they start.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under HYMBA_NO_SKIPS=1 a skipped test counts as failed: a job that installs an extra must run its tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("HYMBA_NO_SKIPS") == "1" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if os.environ.get("HYMBA_SKIPPED") and reporter is not None:
        # The tests and files skipped for lack of a package, for scripts/test_extras.
        skipped = {
            report.nodeid
            for report in reporter.stats.get("skipped", [])
            if isinstance(report.longrepr, tuple)
            and any(said in report.longrepr[2] for said in ("could not import", "is not installed: pip install"))
        }
        Path(os.environ["HYMBA_SKIPPED"]).write_text("".join(f"{node}\n" for node in sorted(skipped)))


@pytest.fixture(scope="session")
def fitted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny run that was fitted, exported and tested; config and data beside it. Do not change it."""
    from fitted import make_run

    return make_run(tmp_path_factory.mktemp("fitted"))


@pytest.fixture(autouse=True)
def signals_left_as_found() -> Iterator[None]:
    """A handler that a test leaves behind would meet the signals of the tests after it in this process."""
    before = {signum: signal.getsignal(signum) for signum in HANDLED}
    yield
    after = {signum: signal.getsignal(signum) for signum in HANDLED}
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after == before
