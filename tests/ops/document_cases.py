"""Sequences of several documents, and what attention takes of them, shared by the tests of packed documents."""

from __future__ import annotations

import torch
from op_cases import assert_close

BATCH, LENGTH, BOS = 2, 131, 1
# Where documents start in each row: at chunks' edges, one token long, in the first and in the last place; the second
# row goes on with a document of before.
STARTS = ([0, 1, 5, 63, 64, 90, 130], [40, 66, 128])
EARLIER = [9, 2]


def positions(device="cpu"):
    """The document positions (B, T) of STARTS, counted one by one."""
    rows = []
    for starts, position in zip(STARTS, EARLIER, strict=True):
        row = []
        for t in range(LENGTH):
            position = 0 if t in starts else position
            row.append(position)
            position += 1
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32, device=device)


def attention_operands(make, narrow, length=LENGTH):
    return {
        "q_BTHK": narrow(BATCH, length, 4, 16),
        "k_BTGK": narrow(BATCH, length, 2, 16, seed=1),
        "v_BTGK": narrow(BATCH, length, 2, 16, seed=2),
    }


def assert_same(got, expected, ratio):
    for number, (actual, reference) in enumerate(zip(got[0], expected[0], strict=True)):
        assert_close(f"result {number}", actual, reference, ratio)
    for name, reference in expected[1].items():
        assert_close(f"gradient of {name}", got[1][name], reference, ratio)
