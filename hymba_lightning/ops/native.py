"""Running the numba kernels: tensors as flat arrays, work items spread over as many threads as torch uses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hymba_lightning.ops.threads import spread

logger = logging.getLogger("hymba_lightning")

_ready: set[str] = set()
_preparing = threading.Lock()


def native_loop(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: `function` compiled by numba on first use, without the GIL, and kept on disk for the next process."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError as error:
        # Numba found no folder to keep it in.
        logger.warning(
            "%s is compiled anew in every process (%s); NUMBA_CACHE_DIR names a folder for it", function.__name__, error
        )
        return njit(nogil=True, error_model="numpy")(function)


def flat(tensor: Tensor) -> np.ndarray:
    """The tensor's values as a flat float32 array, sharing memory with a contiguous float32 tensor."""
    return tensor.detach().float().contiguous().view(-1).numpy()


def rows(x_BTX: Tensor) -> tuple[np.ndarray, int]:
    """A flat float32 array and a stride with which the values of token (b, t) begin at (b*T + t) * stride.

    A float32 tensor whose rows are evenly spaced, a slice of a projection's output say, is not copied.
    """
    batch, length, width = x_BTX.shape
    stride = x_BTX.stride(1)
    if x_BTX.dtype == torch.float32 and x_BTX.stride(2) == 1 and (batch == 1 or x_BTX.stride(0) == length * stride):
        return x_BTX.detach().as_strided(((batch * length - 1) * stride + width,), (1,)).numpy(), stride
    return flat(x_BTX), width


def positions(doc_position_BT: Tensor | None) -> tuple[np.ndarray, bool]:
    """Document positions as a flat int32 array, and whether there are any: one compiled kernel serves both."""
    if doc_position_BT is None:
        return np.zeros(1, np.int32), False
    return doc_position_BT.contiguous().view(-1).numpy(), True


def _prepare(kernel: Callable[..., None], name: str, arguments: tuple) -> None:
    """Loads `kernel` from numba's cache on disk, or compiles it, and logs so, since that takes seconds."""
    with _preparing:
        if name in _ready:
            return
        if not _ready:
            logger.info("loading native CPU loops; the first time on a machine they compile, which takes seconds")
        start = time.perf_counter()
        kernel(0, 0, *arguments)
        seconds = time.perf_counter() - start
        if seconds > 1:
            logger.info("%s: native loop ready after %.1f s", name, seconds)
        _ready.add(name)


def run_items(
    kernel: Callable[..., None], name: str, n_items: int, operations: float, arguments: tuple, threads: int = 0
) -> None:
    """Calls kernel(first, last, *arguments) until every item in [0, n_items) is done, on up to `threads` threads
    (0: as many as torch has).

    `kernel` is a numba function that releases the GIL and writes only what belongs to its items, so the result does not
    depend on the number of threads. `operations` estimates the whole work in inner steps: where it takes less than
    a millisecond or so, the calling thread does it alone.
    """
    if name not in _ready:
        _prepare(kernel, name, arguments)
    threads = threads or torch.get_num_threads()
    if threads == 1 or operations < 2e6:
        kernel(0, n_items, *arguments)
    else:
        spread(lambda item: kernel(item, item + 1, *arguments), n_items, threads)
