"""The unit that everything here is measured in."""

from __future__ import annotations

import math
from typing import Any


def bits_per_byte(nats: Any, n_bytes: Any) -> Any:
    """A text's loss, summed over its tokens in nats, as bits for each of its UTF-8 bytes; numbers or tensors.

    Infinity where a number of tokens stand for no byte, as a document's beginning alone does.
    """
    return math.inf if type(n_bytes) in (int, float) and not n_bytes else nats / (math.log(2) * n_bytes)
