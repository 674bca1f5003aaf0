"""README's Python runs as it stands, and what it trains is worth something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.alone
@pytest.mark.slow
def test_the_notebooks_run_beats_the_unigram_model_by_half_a_bit(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    prepare = [sys.executable, "-m", "hymba_lightning", "prepare", "stdlib", "--out", "data/demo"]
    subprocess.run([*prepare, "--vocab_size", "1024"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(BLOCKS) == 1
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[0]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"^([\d.]+) bits per byte; the unigram model has ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    bpb, unigram = map(float, found.groups())
    assert bpb < unigram - 0.5
