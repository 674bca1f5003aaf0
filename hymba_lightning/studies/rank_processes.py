"""Ranks of one host in processes: none outlives what started it, and what ends one is told with its number."""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from hymba_lightning.errors import UserError, is_user_error, sentence
from hymba_lightning.files import write_atomic
from hymba_lightning.signals import HANDLED

# Between asking a rank to end and ending it.
GRACE_SECONDS = 2.0


def run_ranks(task: Callable[[int, Any], None], request: Any, ranks: int) -> None:
    """Calls `task(rank, request)` in as many processes and waits for them; none is left, however this ends.

    Args:
        task: A function of a module, which the processes import.
        request: What can be pickled.

    Raises:
        UserError: a rank was killed, or refused what it was given.
        RuntimeError: a rank failed; its traceback is the cause.
    """
    before = set(mp.active_children())
    # Started by the first process, the tracker would end the block below.
    multiprocessing.resource_tracker.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Ranks inherit the block: a terminal's Ctrl-C is for this process alone, which ends them.
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
            try:
                context = mp.start_processes(
                    _begin, (task, request, folder), nprocs=ranks, join=False, start_method="spawn"
                )
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
            while not context.join(grace_period=GRACE_SECONDS):
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise _told(error, Path(folder)) from error
        finally:
            for process in set(mp.active_children()) - before:
                process.kill()
                process.join()


def _told(error: Any, folder: Path) -> Exception:
    """What ended the ranks: what one of them refused goes before the broken connections that it left."""
    for path in sorted(folder.iterdir()):
        return UserError(f"rank {path.name}: {path.read_text(encoding='utf-8')}")
    rank = f"rank {error.error_index}"
    if isinstance(error, mp.ProcessRaisedException):
        return RuntimeError(f"{rank} failed: {str(error).strip().splitlines()[-1]}")
    how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with {error.exit_code}"
    return UserError(f"{rank} {how}, for its memory maybe: fewer tokens, a smaller network or fewer ranks take less")


def _begin(rank: int, task: Callable[[int, Any], None], request: Any, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        task(rank, request)
    except Exception as error:
        if is_user_error(error):
            write_atomic(Path(folder) / str(rank), sentence(error))
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
