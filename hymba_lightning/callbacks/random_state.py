"""The state of every random generator that training may use, as plain values that checkpoints can hold."""

from __future__ import annotations

import os
import random
from typing import Any, cast

import numpy as np
import torch


def seed_in_use() -> int | None:
    """What `seed_everything` was last given, in this process or in the one that started it; None if it was not."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdecimal() else None


def random_states() -> dict[str, Any]:
    """States of torch's, the current GPU's, numpy's and Python's generators, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Inverse of `random_states`; a GPU's state is put back on the current GPU, if there is one."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
