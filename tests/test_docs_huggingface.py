"""docs/huggingface.md runs as it stands: its commands, then its Python as one notebook, on a tiny run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "hf"))
from released import write_released_model
from stand_in_hub import stand_in_hub

for package in ("transformers", "safetensors", "lm_eval", "peft"):
    pytest.importorskip(package)

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(fitted_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(fitted_run)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "lines.jsonl").write_text('{"text": "the end"}\n{"text": "of it"}\n')
    write_released_model(tmp_path / "released")
    with stand_in_hub() as hub:
        hub.repositories["nvidia/Hymba-1.5B-Base"] = {
            path.name: path.read_bytes() for path in (tmp_path / "released").iterdir()
        }
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_of_nobody",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }

        def run(command):
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
            return done.stdout

        said = ""
        for command in COMMANDS:
            name, *arguments = shlex.split(command)
            assert name == "hymba"
            said += run([sys.executable, "-m", "hymba_lightning", *arguments])
        assert f"{hub.url}/me/mine/commit/" in said
        assert "all 2 documents" in said
        assert len(PYTHON) == 9
        said = run([sys.executable, "-c", "\n".join(PYTHON)])
    assert "the end" in said
    assert "bits_per_byte" in said
    assert {"me/mine", "me/copy"} <= set(hub.repositories)
