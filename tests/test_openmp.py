"""On a CPU, torch's OpenMP threads give their cores up soon after an operator, as the package sets it."""

import os
import subprocess
import sys

import pytest

COMMAND = """
import os, sys
from hymba_lightning import __main__
assert "torch" not in sys.modules
class Stand:
    main = staticmethod(lambda: print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY")))
sys.modules["hymba_lightning.command_line"] = Stand
__main__.main()
"""


@pytest.mark.parametrize(("first", "seen"), [("hymba_lightning", "2000"), ("torch", "None")])
def test_the_package_sets_it_only_where_torch_has_not_read_it_yet(first, seen):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import {first}, hymba_lightning, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seen


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "2000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_the_command_sets_how_long_threads_spin_before_torch_is_there_and_keeps_what_is_set(given, seen):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    line = [sys.executable, "-c", COMMAND]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seen
