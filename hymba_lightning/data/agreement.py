"""What all ranks of a run must read alike: nodes with disks of their own may hold different data under one path."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import torch.distributed as dist

from hymba_lightning.errors import UserError, sentence


def agree(read: Callable[[], Mapping[str, object]], check: Callable[[], None] = lambda: None) -> None:
    """Calls `check` and `read` on every rank, and compares what `read` returns: names of things, and what tells one
    from another.

    Every rank must call it. Where there is only one, nothing is read.

    Raises:
        Exception: what `check` and `read` raise, here.
        UserError: it failed on another rank, or a rank has something other than rank 0.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        check()
        return
    own: dict[str, object] = {}
    failure: Exception | None = None
    try:
        check()
        own = dict(read())
    except (OSError, ValueError) as error:
        failure = error
    answers: list = [None] * dist.get_world_size()
    # A failure too, so that nobody waits for a rank that is gone.
    dist.all_gather_object(answers, (socket.gethostname(), failure and sentence(failure), own))
    if failure is not None:
        raise failure
    for rank, (host, text, _) in enumerate(answers):
        if text is not None:
            raise UserError(f"rank {rank} on {host}: {text}")
    first_host, _, first = answers[0]
    for rank, (host, _, other) in enumerate(answers):
        for name, value in first.items():
            if other.get(name) != value:
                raise UserError(
                    f"{name}: rank {rank} on {host} has another than rank 0 on {first_host}; every rank must be given "
                    "the same options, and every node the same files"
                )
