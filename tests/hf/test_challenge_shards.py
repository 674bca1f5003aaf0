"""docs/data.md's two commands for the challenge's own shards, at toy size: `hf` downloads, `hymba fit` trains."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_in_hub import stand_in_hub
from tiny import NET, TOKENIZER, write_data

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
(BLOCK,) = (
    block for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "hf download" in block
)
SHARDS = "datasets/datasets/fineweb10B_sp1024"
TOY = {
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
    "model": {"net": NET, "budget_seconds": None, "reserve_seconds": 0, "compile": False},
    "data": {"seq_len": 64, "micro_batch_size": 1},
    "summary": {"plots": False},
}


def test_the_challenges_shards_are_fetched_and_trained_on(tmp_path):
    data = write_data(tmp_path / "made")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "hymba_32k.yaml").write_text(yaml.safe_dump(TOY))
    download, fit = (shlex.split(line) for line in BLOCK.splitlines())
    command = shutil.which("hf", path=str(Path(sys.executable).parent))
    assert command is not None, "huggingface_hub brings it"
    with stand_in_hub() as hub:
        train, val = ((data / f"tiny_{split}_000000.bin").read_bytes() for split in ("train", "val"))
        files = {f"{SHARDS}/fineweb_train_{number:06d}.bin": train for number in (0, 7, 8)}
        files[f"{SHARDS}/fineweb_val_000000.bin"] = val
        files["datasets/tokenizers/fineweb_1024_bpe.model"] = TOKENIZER.read_bytes()
        hub.repositories["willdepueoai/parameter-golf"] = files | {"datasets/docs_selected.jsonl": b"48 GB"}
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
        }
        for line in ([command, *download[1:]], [sys.executable, "-m", "hymba_lightning", *fit[1:]]):
            done = subprocess.run(
                line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "data" / "golf"
    found = {str(path.relative_to(folder)) for kind in ("bin", "model", "jsonl") for path in folder.rglob(f"*.{kind}")}
    assert found == set(files) - {f"{SHARDS}/fineweb_train_000008.bin"}
    assert (tmp_path / "runs" / "golf" / "artifact.hymba").exists()
