"""A thread pool for independent work items, with as many threads as torch uses.

OpenMP makes every thread wait for the slowest at the end of each operator, which costs much on a busy machine; here
only the end of all the work is waited for.
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
    """Keeps torch's CPU operators to the thread that calls them; gives how many threads they had before."""
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
    """Calls work(item) once for every item in [0, n_items), on the calling thread and up to threads-1 others.

    The items must be independent and release the GIL in their long parts. An exception in one of them is raised here.
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
    """`spread` for items made of torch operators, each of which keeps to its thread and records no gradient."""
    inference = torch.is_inference_mode_enabled()

    def run(item: int) -> None:
        # Both settings belong to the thread, and a new thread starts with neither.
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            work(item)

    with one_torch_thread() as threads:
        spread(run, n_items, threads)
