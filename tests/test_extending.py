"""docs/extending.md: its files, one of each kind and none changed, are chosen by name and do their work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```py\n# (\S+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
USE = """
import sys
from pathlib import Path

import torch

import hymba_lightning
from hymba_lightning import Hymba, HymbaConfig
from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.model import RuntimeConfig
from hymba_lightning.ops.selective_scan import available_backends
from hymba_lightning.quantization import QuantizationConfig, load_artifact, save_artifact
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer

folder = Path.cwd()
assert Path(hymba_lightning.__file__).is_relative_to(folder)
small = dict(vocab_size=258, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, d_state=4)
scanned = Hymba(HymbaConfig(**small), RuntimeConfig(scan_backend="my_scan"))
assert "my_scan" in available_backends("cpu")

net = Hymba(HymbaConfig(**small, mixer="my_mixer", mixer_options={"start": 1.0}))
(folder / "tokenizer.bytes").write_bytes(b"MINE")
ids = torch.tensor([load_tokenizer(folder / "tokenizer.bytes").encode_text("Any text – 32 bytes and some more.")])
optimizer = build_optimizer(net, OptimizerConfig(name="my_optimizer", options={"beta": 0.5}))
losses = []
for _ in range(12):
    loss = torch.nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.3, losses
with torch.no_grad():
    assert scanned(ids).shape == (1, ids.size(1), 258)

config = QuantizationConfig(scheme="my_scheme", keep_float_numel=500, zstd_level=3)
save_artifact(
    folder / "a", net.state_dict(), config=net.config.to_dict(), tokenizer={}, metadata={}, scheme=config,
)
assert load_artifact(folder / "a").quantization["scheme"] == "my_scheme"
print("all of mine")
"""


TESTS = [
    "ops/test_selective_scan.py",
    "model/test_mixers.py",
    "quantization/test_schemes.py",
    "training/test_optim.py",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the package with the page's files; returns what runs Python there."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "hymba_lightning", folder / "hymba_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        file = folder / "hymba_lightning" / name
        assert not file.exists()
        file.write_text(text, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    return run


def test_the_page_has_one_file_of_each_kind():
    assert len(FILES) == 5


@pytest.mark.slow
def test_one_file_more_of_each_kind_is_all_it_takes(house):
    done = house("-c", USE)
    assert done.stdout == "all of mine\n", done.stderr
    told = house("-m", "hymba_lightning", "fit", "--help").stdout
    for option, name in {
        "scan_backend": "my_scan",
        "mixer": "my_mixer",
        "name": "my_optimizer",
        "scheme": "my_scheme",
    }.items():
        assert any(name in part for part in told.split(f".{option} ")[1:]), option


@pytest.mark.slow
@pytest.mark.more
def test_the_tests_of_each_kind_go_over_the_new_files(house):
    """A mixer so added is cut, exported, adapted and drawn from as the others are."""
    options = ["-v", "-p", "no:cacheprovider", "-k", "my_scan or my_mixer or my_scheme or my_optimizer"]
    done = house("-m", "pytest", *options, *(str(ROOT / "tests" / name) for name in TESTS))
    assert done.returncode == 0, done.stdout[-3000:]
    counted = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert counted > 40, done.stdout[-3000:]
