"""The entry of the native CPU loops: see loops.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import HIDDEN


def _load() -> Callable:
    from hymba_lightning.ops.sliding_window.loops import sliding_window_attention_numba

    return sliding_window_attention_numba


BACKEND = Backend(
    "native CPU loops",
    _load,
    devices=("cpu",),
    elsewhere="use backend 'flex' or 'flash'",
    package="numba",
    install="pip install numba",
    refuses=((lambda call: call.hidden, HIDDEN),),
    auto={"cpu": 15},
)
