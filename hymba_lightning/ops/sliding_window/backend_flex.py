"""The entry of torch's compiled flex_attention: see compiled_flex.py."""

from collections.abc import Callable

from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.sliding_window.naive import HIDDEN


def _load() -> Callable:
    from hymba_lightning.ops.sliding_window.compiled_flex import sliding_window_attention_flex

    return sliding_window_attention_flex


BACKEND = Backend(
    "torch's compiled flex_attention",
    _load,
    devices=("cuda",),
    elsewhere="flex_attention has no backward elsewhere; use 'blocked'",
    refuses=((lambda call: call.hidden, HIDDEN),),
    auto={"cuda": 10},
)
