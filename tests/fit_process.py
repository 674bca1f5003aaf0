"""`hymba` commands in processes of their own that can be killed, started quickly.

A server process imports everything once and forks for each command, so that a test can start, kill and resume a run
many times: multiprocessing's forkserver, which has none of the test process's threads.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import NET, write_data

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hymba_lightning.cli", "hymba_lightning.callbacks.export", "numba"])


def write_config(folder: Path, **model: object) -> Path:
    """Tiny data and a config for `hymba fit` on one CPU rank that checkpoints every step; returns the config's path."""
    write_data(folder / "data")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 30, "logger": False},
        "model": {
            "net": NET,
            "optimizer": {"warmdown_iters": 20, "muon_momentum_warmup_steps": 15},
            "ema_decay": 0.9,
            "log_every_n_steps": 5,
            "compile_warmup_steps": 0,
            **model,
        },
        "data": {
            "data_dir": str(folder / "data"),
            "seq_len": 64,
            "micro_batch_size": 2,
            "ttt_chunk_tokens": 256,
            "shuffle_seed": 3,
        },
        "checkpoint": {"every_n_seconds": None, "every_n_steps": 1},
        "export": {"enabled": False},
        "summary": {"plots": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _run(arguments: list[str], environment: dict[str, str], log: str, hook: object) -> None:
    """In the child: everything printed goes to the log."""
    with open(log, "a", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    if callable(hook):
        hook(int(environment.get("RANK", "0")))
    sys.argv = ["hymba", *arguments]
    from hymba_lightning.__main__ import main

    main()


def typed(config: Path, run: Path, *options: str) -> list[str]:
    """The command line of a fit as a user types it, for a process that is no child of the server."""
    fit = ["fit", "--config", str(config), "--run_dir", str(run)]
    return [sys.executable, "-m", "hymba_lightning", *fit, *options]


@functools.cache
def _serve() -> None:
    """Starts the server, which finds the tests' modules by this variable alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()


def start(
    arguments: list[str], log: Path, environment: dict[str, str] | None = None, hook: object = None
) -> multiprocessing.Process:
    """Starts `hymba <arguments>`; its output is appended to `log`. `hook(rank)`, importable, runs first."""
    _serve()
    process = CONTEXT.Process(target=_run, args=(arguments, environment or {}, str(log), hook), daemon=True)
    process.start()
    return process


def start_ranks(arguments: list[str], log: Path, world_size: int, hook: object = None) -> list[multiprocessing.Process]:
    """Starts one process per rank, with the environment that torchrun would give them. Rank r logs to <log>.r"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [
        start(
            [*arguments, "--trainer.devices", str(world_size), "--trainer.strategy", "ddp"],
            log.with_name(f"{log.name}.{rank}"),
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            hook,
        )
        for rank in range(world_size)
    ]


def start_nodes(
    arguments: list[str], log: Path, n_nodes: int, hook: object, environment: dict[str, str]
) -> list[multiprocessing.Process]:
    """Starts one process per node, of one rank each, as torchrun on every node would. Node n logs to <log>.n"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n_nodes),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    options = ["--trainer.devices", "1", "--trainer.num_nodes", str(n_nodes), "--trainer.strategy", "ddp"]
    return [
        start(
            [*arguments, *options],
            log.with_name(f"{log.name}.{node}"),
            shared | environment | {"RANK": str(node), "GROUP_RANK": str(node)},
            hook,
        )
        for node in range(n_nodes)
    ]


def finish(processes: list[multiprocessing.Process], timeout: float = 120.0) -> list[int | None]:
    """Waits for all; exit codes (None for one that still runs, which is then killed)."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def wait_for(condition: object, timeout: float = 60.0) -> None:
    """Polls until `condition()` is true. Raises TimeoutError."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.005)


def log_of(log: Path) -> str:
    """What a process has printed so far."""
    return log.read_text(encoding="utf-8", errors="replace")
