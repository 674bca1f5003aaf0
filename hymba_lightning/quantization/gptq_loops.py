"""GPTQ's inner loop, compiled by numba. R rows (outputs), C columns (inputs) of a weight."""

import numpy as np

from hymba_lightning.ops.native import native_loop


@native_loop
def round_block(start, end, q_max, work, upper, scale, q):
    """Columns `start` … `end` of work (C, R), which become their errors; q (C, R). Without the GIL: torch's operators,
    six small ones a column, would have the threads of all tensors wait for it."""
    for column in range(start, end):
        for row in range(scale.size):
            code = min(max(np.rint(work[column, row] / scale[row]), -q_max), q_max)
            q[column, row] = code
            work[column, row] = (work[column, row] - code * scale[row]) / upper[column, column]
        for later in range(column + 1, end):
            factor = upper[column, later]
            for row in range(scale.size):
                work[later, row] -= factor * work[column, row]
