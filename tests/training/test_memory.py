"""The estimate of a training step's memory against what a step takes, and what is said when it is too much."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from fit_process import CONTEXT

from hymba_lightning.errors import UserError
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.training.memory import GIB, MemoryEstimate, check_memory, estimate_memory, free_memory
from hymba_lightning.training.optim import OptimizerConfig, build_optimizer

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


def _steps(net: dict, runtime: dict, length: int, rows: int) -> None:
    built = Hymba(HymbaConfig(**net), RuntimeConfig(**runtime)).train()
    optimizer = build_optimizer(built, OptimizerConfig())
    ids = torch.randint(1024, (rows, length))
    for _ in range(2):
        built(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _bytes_of(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _measure(net: dict, runtime: dict, length: int, rows: int, answer: Connection) -> None:
    """In a process of its own: sends what training takes at its peak."""
    torch.set_num_threads(1)
    # A small step first: the backends' own memory is none of the estimate's.
    _steps(NET, runtime, 128, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _bytes_of("VmRSS")
    _steps(net, runtime, length, rows)
    # getrusage's peak would be that of the process that started this one, where that was larger.
    answer.send(_bytes_of("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("net", "runtime", "length", "rows"),
    [
        ({}, {}, 4096, 1),
        pytest.param({"d_model": 256}, {}, 2048, 2, marks=pytest.mark.more),
        ({"vocab_size": 4096}, {}, 4096, 1),
        ({}, {"compute_dtype": "bfloat16"}, 4096, 2),
        pytest.param({"n_layers": 8}, {"activation_checkpointing": True}, 4096, 2, marks=pytest.mark.more),
    ],
)
def test_the_estimate_is_within_a_factor_of_one_and_a_half(net, runtime, length, rows):
    taken, answer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(NET | net, runtime, length, rows, answer))
    process.start()
    answer.close()
    # The child's end is closed with it: one that fails is an EOFError here.
    peak = taken.recv()
    process.join()
    estimate = estimate_memory(
        HymbaConfig(**(NET | net)), RuntimeConfig(**runtime), length, rows, averaged=False, warmup=False
    )
    assert 1 / 1.5 < estimate.total / peak < 1.5


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
