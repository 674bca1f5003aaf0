"""What a step frees on a CPU, the next one uses, without asking the system for pages."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from hymba_lightning.training.pages import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages()

def step():
    kept = [torch.ones(2**20) for _ in range(12)]
    return sum(map(torch.sum, kept))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_second_step_needs_hardly_a_new_page():
    faults = {
        word: int(
            subprocess.run([sys.executable, "-c", STEPS, word], capture_output=True, text=True, check=True).stdout
        )
        for word in ("keep", "as it is")
    }
    # 48 MiB are 12,288 pages of 4 KiB.
    assert faults["keep"] < 1500 < 6000 < faults["as it is"]


def test_another_libc_is_left_alone(monkeypatch):
    from hymba_lightning.training.pages import keep_pages

    keep_pages.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_pages()
    keep_pages.cache_clear()
