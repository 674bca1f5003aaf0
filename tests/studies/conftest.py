import signal
import threading

import pytest


@pytest.fixture
def ctrl_c():
    """Interrupts the main thread, wherever it waits, as Ctrl-C does, also in a parallel process of tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
