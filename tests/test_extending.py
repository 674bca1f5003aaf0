"""One file more of each kind, none changed: chosen by its name, in the help, and doing its work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "ops/selective_scan/backend_mine.py": """
from hymba_lightning.ops.registry import Backend
from hymba_lightning.ops.selective_scan.naive import selective_scan_naive

BACKEND = Backend("my own scan", lambda: selective_scan_naive)
""",
    "model/mixers/mine.py": """
import torch
import torch.nn.functional as F

from hymba_lightning.model.mixer import HybridMixer
from hymba_lightning.model.roles import Role, parameter


class Mixer(HybridMixer):
    '''A decaying sum of one projection.'''

    options = {"start": 2.0}

    def input_widths(self, options):
        self.start = float(options["start"])
        return [self.config.d_inner]

    def make_branch(self):
        self.decay = parameter(torch.full((self.config.d_inner,), self.start), Role.DYNAMICS)

    def branch(self, x, inputs, state, return_state, doc_position):
        last = inputs[0].new_zeros(x.size(0), self.config.d_inner) if state is None else state[0]
        out = []
        for t in range(x.size(1)):
            if doc_position is not None:
                last = last * (doc_position[:, t : t + 1] > 0)
            last = last * self.decay.sigmoid() + inputs[0][:, t]
            out.append(last)
        return torch.stack(out, 1), (last,)

    def branch_flops(self):
        return 2.0 * self.config.d_inner

    def branch_activations(self):
        return self.config.d_inner
""",
    "quantization/schemes/mine.py": """
from hymba_lightning.quantization.rows import quantize_rows
from hymba_lightning.quantization.schemes import Scheme


class Mine(Scheme):
    '''A quarter of the search.'''

    summary = "my own scheme"

    def round(self, name, tensor, bits, config):
        return quantize_rows(tensor, bits, clip_quantile=0.9999, clip_steps=2, name=name)


SCHEME = Mine()
""",
    "training/optimizers/mine.py": """
import torch

from hymba_lightning.training.optim import HymbaOptimizer


class Optimizer(HymbaOptimizer):
    '''Signs of the gradient.'''

    algorithm = "mine"
    matrix_lr = 0.001
    options = {"power": 1.0}

    @torch.no_grad()
    def update(self, group):
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"] * self.rule["power"])
""",
    "data/tokenizer_mine.py": """
from hymba_lightning.data.tokenizer import ByteTokenizer


def reads(head):
    return head.startswith(b"MINE")


def load(path):
    return Bytes()


class Bytes(ByteTokenizer):
    '''Two controls, then the bytes.'''

    def get_piece_size(self):
        return 258

    def bos_id(self):
        return 0

    def eos_id(self):
        return 1

    def is_control(self, token):
        return token < 2

    def raw(self, token):
        return bytes([token - 2] * (token > 1))

    def encode_text(self, text):
        return [byte + 2 for byte in text.encode()]
""",
}
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

folder = Path(sys.argv[1])
assert Path(hymba_lightning.__file__).is_relative_to(folder)
small = dict(vocab_size=258, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, window=8, d_state=4)
scanned = Hymba(HymbaConfig(**small), RuntimeConfig(scan_backend="mine"))
assert "mine" in available_backends("cpu")

net = Hymba(HymbaConfig(**small, mixer="mine", mixer_options={"start": 1.0}))
(folder / "tokenizer.bytes").write_bytes(b"MINE")
ids = torch.tensor([load_tokenizer(folder / "tokenizer.bytes").encode_text("Any text – 32 bytes and some more.")])
optimizer = build_optimizer(net, OptimizerConfig(name="mine", options={"power": 2.0}))
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

config = QuantizationConfig(scheme="mine", keep_float_numel=500, zstd_level=3)
save_artifact(
    folder / "a", net.state_dict(), config=net.config.to_dict(), tokenizer={}, metadata={}, scheme=config,
)
assert load_artifact(folder / "a").quantization["scheme"] == "mine"
print("all of mine")
"""


@pytest.mark.slow
def test_one_file_more_of_each_kind_is_all_it_takes(tmp_path):
    shutil.copytree(
        ROOT / "hymba_lightning", tmp_path / "hymba_lightning", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, text in FILES.items():
        (tmp_path / "hymba_lightning" / name).write_text(text)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    run = [sys.executable, "-c", USE, str(tmp_path)]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "all of mine\n", done.stderr
    help_text = [sys.executable, "-m", "hymba_lightning", "fit", "--help"]
    told = subprocess.run(help_text, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    for option in ("scan_backend", "mixer", "name", "scheme"):
        assert any("mine" in part for part in told.split(f".{option} ")[1:]), option
