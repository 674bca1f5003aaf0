"""Runs tutorial.md's blocks, in order, as one script in a temporary folder: `python docs/run_tutorial.py`."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

BLOCKS = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    page = Path(__file__).with_name("tutorial.md").resolve()
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names: dict[str, object] = {}
        for block in BLOCKS.finditer(text):
            # As many empty lines as stand above a block, so that an error names the page's line.
            above = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(above + block[1], str(page), "exec"), names)
        os.chdir(page.parent)
