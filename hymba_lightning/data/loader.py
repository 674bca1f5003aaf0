"""Batches read ahead by a background thread, in a loader that Lightning neither re-samples nor re-orders."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch

BatchT = TypeVar("BatchT", bound=tuple)


def read_ahead(
    load: Callable[[int], BatchT], indices: Iterable[int], depth: int, device: torch.device | None = None
) -> Iterator[BatchT]:
    """Yield load(i) for each index in order, the next `depth` being made by a background thread meanwhile.

    Args:
        load: Makes one batch: a named tuple of CPU tensors and numbers.
        indices: What to load; may be endless.
        depth: Batches made ahead, at least 1.
        device: With a CUDA device, tensors are put into pinned memory so that copies to it overlap with work.

    Raises:
        Whatever `load` raises, at the batch that it concerns.
    """
    pin = device is not None and device.type == "cuda"

    def make(index: int) -> BatchT:
        batch = load(index)
        return _pinned(batch) if pin else batch

    # Pinning in a thread that has not chosen its device would open a context on GPU 0 from every rank.
    pool = ThreadPoolExecutor(1, "hymba-data", initializer=partial(torch.cuda.set_device, device) if pin else None)
    try:
        remaining = iter(indices)
        pending: deque[Future[BatchT]] = deque(pool.submit(make, index) for index in islice(remaining, depth))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(make, index) for index in islice(remaining, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Loader:
    """A sized iterable of batches. Not a torch DataLoader: Lightning would put a DistributedSampler into one.

    Lightning resumes a loader without a length one batch too late, so even the endless training loader has one.

    Args:
        length: Batches this rank will be given.
        batches: Starts an iteration.
    """

    def __init__(self, length: int, batches: Callable[[], Iterator[tuple]]) -> None:
        self._length = length
        self._batches = batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple]:
        return self._batches()


class ResumableLoader(Loader):
    """A loader whose iterations start where the datamodule's restored state says.

    Its own state is empty; having one at all tells Lightning that resuming within an epoch is safe.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: Lightning has restored the datamodule before."""


def _pinned(batch: BatchT) -> BatchT:
    return type(batch)(*(item.pin_memory() if isinstance(item, torch.Tensor) else item for item in batch))
