"""Ends the other ranks, with a message that says who died, when one rank of a run does.

A process that is killed closes its sockets, whatever it was doing; so every rank holds one connection to rank 0, on
which nothing is said until something happens. Without this, ranks whose peer is gone wait in a GPU collective for
NCCL's timeout, half an hour as Lightning sets it.
"""

import contextlib
import faulthandler
import json
import logging
import secrets
import selectors
import socket
import sys
import threading
from typing import Any, cast

import lightning.pytorch as pl
import torch.distributed as dist

from hymba_lightning.signals import Stopped

log = logging.getLogger("hymba_lightning")

CONNECT_SECONDS = 30.0
MOST_BYTES = 1 << 16
# A host that loses power closes nothing: probes after 10 s of silence, given up after 4 at 5 s.
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
SILENT = "its process ended without a word: killed, out of memory, or its machine is gone"


class RankWatch(pl.Callback):
    """Tells all ranks of the one that fails or disappears, and ends their processes.

    Installed by HymbaModule; does nothing on one rank.

    Args:
        grace_seconds: Time for a rank to end by itself (most do, by the broken collective) before its process is ended
            with exit code 1 and a traceback of its threads.
    """

    def __init__(self, grace_seconds: float = 10.0) -> None:
        if not grace_seconds >= 0:
            raise ValueError(f"grace_seconds is {grace_seconds}; it must be 0 or positive")
        self.grace_seconds = grace_seconds
        self._rank, self._size = 0, 1
        self._peers: dict[socket.socket, int] = {}
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size < 2 or not (dist.is_available() and dist.is_initialized()):
            return
        self._close()
        self._rank, self._size = trainer.global_rank, trainer.world_size
        self._news, self._closing, self._peers = threading.Event(), threading.Event(), {}
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = environment.main_address if environment else "127.0.0.1"
        listener, secret = (_listen(host), secrets.token_hex(16)) if self._rank == 0 else (None, "")
        port = listener.getsockname()[1] if listener else 0
        port, secret = trainer.strategy.broadcast((port, secret))
        if listener:
            self._start(self._serve, listener, secret)
            return
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            log.warning(
                "rank %d cannot reach rank 0 at %s:%d (%s): a rank that dies will be noticed by the "
                "collectives' timeout only",
                self._rank,
                host,
                port,
                error,
            )
            return
        connection.settimeout(None)
        _keep_alive(connection)
        _send(connection, {"secret": secret, "rank": self._rank})
        self._peers = {connection: 0}
        self._start(self._listen_to_rank_0, connection)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, unless this rank only fails because another one did."""
        if self._thread is None:
            return
        # A signal ends all ranks at one step; that is no failure.
        if not isinstance(exception, KeyboardInterrupt | Stopped) and not self._news.wait(1.0):
            text = f"{type(exception).__name__}: {exception}"[:2000]
            if self._rank:
                self._closing.set()  # rank 0 hangs up when it is told, which is not its death
            self._tell({"rank": self._rank, "text": text})
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # The connections ---------------------------------------------------------------------------------------------

    def _start(self, target: Any, *arguments: Any) -> None:
        self._thread = threading.Thread(target=target, args=arguments, name="hymba-rank-watch", daemon=True)
        self._thread.start()

    def _close(self) -> None:
        """Say goodbye, so that the end of this rank is no death."""
        if self._thread is None:
            return
        self._closing.set()
        self._tell({"done": True})
        if self._rank:
            for connection in self._peers:
                # Wakes the thread that reads; the connection may be closed already.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._thread = None

    def _serve(self, listener: socket.socket, secret: str) -> None:
        """Rank 0: take connections, and pass on what happens to one to all."""
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ)
            while not self._closing.is_set():
                for key, _ in selector.select(timeout=0.2):
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        connection.settimeout(5.0)
                        hello = _receive(connection) or {}
                        if hello.get("secret") != secret:
                            connection.close()
                            continue
                        connection.settimeout(None)
                        _keep_alive(connection)
                        self._peers[connection] = int(hello["rank"])
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    connection = cast(socket.socket, key.fileobj)
                    message = _receive(connection)
                    selector.unregister(connection)
                    rank = self._peers.pop(connection)
                    connection.close()
                    if message is None or "text" in message:
                        news = message or {"rank": rank, "text": SILENT}
                        self._tell(news)
                        self._end(news)
            for connection in list(self._peers):
                connection.close()

    def _listen_to_rank_0(self, connection: socket.socket) -> None:
        with connection:
            message = _receive(connection)
            if self._closing.is_set() or (message or {}).get("done"):
                return
            self._end(message or {"rank": 0, "text": SILENT})

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in list(self._peers):
            _send(connection, message)

    def _end(self, news: dict[str, Any]) -> None:
        """Say who died, and end this process should it not do so by itself."""
        if self._news.is_set():
            return
        log.error(
            "rank %d of %d died (%s). Rank %d ends too; the run goes on from its last checkpoint with --ckpt_path last",
            news["rank"],
            self._size,
            news["text"],
            self._rank,
        )
        self._news.set()
        # Not a Python timer: its thread would need the interpreter, which a rank that stands still in a driver's call
        # may hold for ever. This one needs nothing, and shows where every thread stood.
        faulthandler.dump_traceback_later(max(self.grace_seconds, 0.001), exit=True, file=sys.__stderr__ or 2)


def _listen(host: str) -> socket.socket:
    """A listening socket on a free port; on all interfaces where the address is not this machine's own."""
    try:
        return socket.create_server((host, 0), backlog=1024)
    except OSError:
        return socket.create_server(("", 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """A line of JSON. A peer that is gone already is the reader's to notice."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError as error:
        log.debug("a rank cannot be told: %s", error)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next line of JSON, None where the peer is gone."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < MOST_BYTES:
            # Byte by byte: what follows the line stays in the socket, where the selector sees it.
            part = connection.recv(1)
            if not part:
                return None
            line += part
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
