"""The unit that everything here is measured in."""

from __future__ import annotations

import math
from typing import Any


def bits_per_byte(nats: Any, n_bytes: Any) -> Any:
    """A text's loss, summed over its tokens in nats, as bits for each of its UTF-8 bytes; numbers or tensors."""
    return nats / (math.log(2) * n_bytes)
