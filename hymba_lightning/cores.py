"""How many cores there are for this process."""

import os


def available_cores() -> int:
    """Those that it may run on, where the system tells (a container, a job of a cluster); else the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
