"""Runs the independent parts of an op on several CPU threads: one barrier for all the work instead of one per operator.

torch's own operators (OpenMP) share each operator out over the threads and make all of them wait for the slowest at its
end. On a busy machine those waits cost more than the threads gain. Here a thread takes a whole part, such as one
sequence, goes through all its operators alone, and takes the next; only the end of the last part is waited for.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_torch_thread() -> Iterator[int]:
    """Inside, torch's CPU operators run on the thread that calls them. Yields the number of threads they had before,
    which they have again afterwards."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool(process_id: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="hymba-ops")


def spread(work: Callable[[int], None], n_items: int, threads: int) -> None:
    """Calls `work(item)` once for each item 0 … n_items - 1, on several threads; returns when all are done.

    Args:
        work: What is done for an item. Calls run side by side, so that they must not write to the same memory, and they
            gain time only where they release the GIL, as numba's functions and torch's operators do.
        n_items: Number of items.
        threads: Most threads, the calling one included.

    Raises:
        Exception: what `work` raised first on the calling thread or, failing that, on another one.
    """
    # Taking the next number of a count is atomic, and a thread that is held up delays no more than one item.
    counter = itertools.count()

    def run() -> None:
        while (item := next(counter)) < n_items:
            work(item)

    helpers = min(threads, n_items) - 1
    futures = [_pool(os.getpid(), helpers).submit(run) for _ in range(helpers)]
    run()
    for future in futures:
        future.result()


def spread_torch(work: Callable[[int], None], n_items: int) -> None:
    """`spread` over as many threads as torch has now, for items that consist of torch operators.

    Each operator keeps to its item's thread. No gradient is recorded; inference mode holds in the items where it holds
    for the caller.
    """
    inference = torch.is_inference_mode_enabled()

    def run(item: int) -> None:
        # Both settings belong to the thread, and a new thread starts with neither.
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            work(item)

    with one_torch_thread() as threads:
        spread(run, n_items, threads)
