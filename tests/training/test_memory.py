"""The estimate of a training step's memory against what a step takes, and what is said when it is too much."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from hymba_lightning.errors import UserError
from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.training.memory import GIB, MemoryEstimate, check_memory, estimate_memory, free_memory

NET = {
    "vocab_size": 1024,
    "n_layers": 4,
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 2,
    "window": 64,
    "bigram_buckets": 64,
    "bigram_dim": 8,
}
# A small step first: the backends' own memory is none of the estimate's.
MEASURE = """
import ctypes, gc, json, sys, torch
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer
torch.set_num_threads(1)
def steps(net, runtime, length, rows):
    net = Hymba(HymbaConfig(**net), RuntimeConfig(**runtime)).train()
    optimizer = build_optimizer(net, OptimizerConfig())
    ids = torch.randint(1024, (rows, length))
    for _ in range(2):
        net(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
small, net, runtime, length, rows = json.loads(sys.argv[1])
steps(small, runtime, 128, 1)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
def kilobytes(name):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
before = kilobytes("VmRSS")
steps(net, runtime, length, rows)
# getrusage's peak would be that of the process that started this one, where that was larger.
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("net", "runtime", "length", "rows"),
    [
        ({}, {}, 4096, 1),
        ({"d_model": 256}, {}, 2048, 2),
        ({"vocab_size": 4096}, {}, 4096, 1),
        ({}, {"compute_dtype": "bfloat16"}, 4096, 2),
        ({"n_layers": 8}, {"activation_checkpointing": True}, 4096, 1),
    ],
)
def test_the_estimate_is_within_a_factor_of_one_and_a_half(net, runtime, length, rows):
    given = json.dumps([NET, NET | net, runtime, length, rows])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, given], capture_output=True, text=True, check=True, timeout=200
    )
    estimate = estimate_memory(
        HymbaConfig(**(NET | net)), RuntimeConfig(**runtime), length, rows, averaged=False, warmup=False
    )
    assert 1 / 1.5 < estimate.total / int(done.stdout) < 1.5


def test_the_default_network_at_full_length_does_not_fit_24_gib():
    estimate = estimate_memory(HymbaConfig(), RuntimeConfig(), 32_768, 2)
    with pytest.raises(UserError, match=r"configs/demo\.yaml.*micro_batch_size.*activation_checkpointing"):
        check_memory(estimate, 20 * GIB)


def test_what_will_be_tight_is_a_warning_and_what_fits_is_silent(caplog):
    caplog.set_level(logging.WARNING, logger="hymba_lightning")
    estimate = MemoryEstimate(GIB, 3 * GIB)
    check_memory(estimate, 8 * GIB)
    check_memory(estimate, None)
    assert not caplog.records
    check_memory(estimate, 4 * GIB)
    assert "needs about 4.0 GiB of memory and 4.0 GiB are free" in caplog.text
    with pytest.raises(UserError):
        check_memory(estimate, 4 * GIB, ranks=2)


def test_recomputation_halves_the_activations_of_a_deep_network():
    kept, recomputed = (
        estimate_memory(
            HymbaConfig(**(NET | {"n_layers": 16})), RuntimeConfig(activation_checkpointing=recompute), 4096, 1
        ).activations
        for recompute in (False, True)
    )
    assert recomputed < 0.6 * kept


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_told():
    assert 2**24 < free_memory() < 2**45
