"""Runs a test file's Triton cases in Triton's interpreter, on the CPU, in one process of its own.

Triton decides at import whether it interprets, so the process that pytest runs in cannot do both. The file calls
`run_cases` when it is run as a script; its fixture calls `collect` and each test then reads its case's results.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hymba_lightning.ops.testing import rms_ratio

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
REPOSITORY = Path(__file__).parents[2]


def collect(test_file: str, *names: str) -> dict[str, dict]:
    """Case -> its results, all or those of `names`, from a fresh interpreting process; RuntimeError with its output if
    it dies."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", test_file, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0:
        raise RuntimeError(f"the interpreting process failed:\n{done.stdout}\n{done.stderr}")
    return {line["case"]: line for line in lines}


def run_cases(cases: dict[str, Callable[[], dict]]) -> None:
    """Prints one JSON line for each case: what it returns, or the traceback it died of under "error"."""
    torch.set_num_threads(1)
    # Fresh memory is filled with NaN, so that an element that no kernel writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, case in cases.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            found = case()
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"case": name, **found}), flush=True)


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float | str]:
    """Name -> RMS ratio, or what is wrong with the shape, the type or the values."""
    found: dict[str, float | str] = {}
    for name, wanted in expected.items():
        got = actual[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            found[name] = f"{got.dtype} {tuple(got.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
        elif not torch.isfinite(got).all():
            found[name] = f"{(~torch.isfinite(got)).sum().item()} of {got.numel()} entries are not finite"
        elif got.numel():
            found[name] = rms_ratio(got, wanted)
    return found


def assert_within(results: dict, limit: float) -> None:
    """Fails, naming all that is off, unless every ratio of a case is at most the limit."""
    assert "error" not in results, results["error"]
    ratios = results["ratios"]
    assert ratios, "nothing was compared"
    wrong = {name: ratio for name, ratio in ratios.items() if isinstance(ratio, str) or not ratio <= limit}
    assert not wrong, f"over {limit}: {wrong}"
