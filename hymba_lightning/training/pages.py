"""Memory that a training step on a CPU frees stays with the process, in large pages, for the next step to use.

glibc gives large blocks back to the system and asks for them anew: a step's activations then cost thousands of page
faults, each zeroing 4 KB, and as many entries of the CPU's page table cache. Sources: mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MADV_HUGEPAGE = 14
# Addresses, not memory, that the heap gets at once.
ROOM = 2**30


@functools.cache
def keep_pages() -> bool:
    """Makes malloc do so from now on, for the whole process; returns whether it does: without glibc, or where the
    system gives no large pages, it does not."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: ROOM}
    if not all(libc.mallopt(name, value) for name, value in settings.items()):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # The heap grows by a block and the room behind it.
    libc.free(libc.malloc(2**26))
    libc.mallopt(M_TOP_PAD, 2**26)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith("[heap]"):
            start, stop = (int(edge, 16) for edge in line.split()[0].split("-"))
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            return libc.madvise(start, stop - start, MADV_HUGEPAGE) == 0
    return False
