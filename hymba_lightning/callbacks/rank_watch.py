"""Ends the other ranks, with a message that says who died, when one rank of a run does.

A process that is killed closes its sockets, whatever it was doing; so every rank holds one connection to rank 0. One
that is stopped, or whose machine stands still, closes nothing, but sends no beat either. Without this, ranks whose peer
is gone wait in a GPU collective for NCCL's timeout, half an hour as Lightning sets it.
"""

import contextlib
import faulthandler
import json
import logging
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, cast

import lightning.pytorch as pl
import torch.distributed as dist

from hymba_lightning import signals
from hymba_lightning.errors import all_is_told
from hymba_lightning.signals import Stopped
from hymba_lightning.trainer_internals import started_ranks

log = logging.getLogger("hymba_lightning")

CONNECT_SECONDS = 30.0
MOST_BYTES, MOST_CHARS = 1 << 16, 2000
# A host that loses power closes nothing: probes after 10 s of silence, given up after 4 at 5 s.
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
SILENT = "its process ended without a word: killed, out of memory, or its machine is gone"
STANDS_STILL = "its process has stood still for {:.0f} s: it was stopped, or its machine hangs"
BEAT_SECONDS = 2.0
# Ranks that end together by one signal do so well within this time.
SIGNAL_SECONDS = 3.0


class RankWatch(pl.Callback):
    """Tells all ranks of the one that fails or disappears, and ends their processes.

    Installed by HymbaModule; does nothing on one rank.

    Args:
        grace_seconds: Time for a rank to end by itself (most do, by the broken collective) before its process is ended
            with exit code 1 and a traceback of its threads.
        still_seconds: A rank counts as dead whose process has stood still for so long. What it works on does not
            matter: a thread of its own sends the beats.
    """

    def __init__(self, grace_seconds: float = 10.0, still_seconds: float = 60.0) -> None:
        if not grace_seconds >= 0:
            raise ValueError(f"grace_seconds is {grace_seconds}; it must be 0 or positive")
        if not still_seconds > 2 * BEAT_SECONDS:
            raise ValueError(f"still_seconds is {still_seconds}; it must be over {2 * BEAT_SECONDS:.0f}")
        self.grace_seconds, self.still_seconds = grace_seconds, still_seconds
        self._rank, self._size = 0, 1
        self._started: list[subprocess.Popen] = []
        """The ranks after this one, where it has started them."""
        self._peers: dict[socket.socket, int] = {}
        self._sending = threading.Lock()
        self._news, self._heard = threading.Event(), threading.Event()
        """That this rank's end was announced, and that something was heard that will end it."""
        self._stopped: dict[str, Any] = {}
        """What was heard of a rank that got a signal."""
        self._own_text = self._text = ""
        """What this rank failed with, and another one."""
        self._leaving, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._thread is None:
            self.begin(trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """Connects the ranks; every rank must call it. As early as they can talk: data are opened before `setup`."""
        if trainer.world_size < 2 or not (dist.is_available() and dist.is_initialized()):
            return
        self._close()
        self._rank, self._size, self._started = trainer.global_rank, trainer.world_size, started_ranks(trainer)
        self._news, self._heard, self._peers, self._stopped = threading.Event(), threading.Event(), {}, {}
        self._leaving, self._closing, self._own_text = threading.Event(), threading.Event(), ""
        self._text = ""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = environment.main_address if environment else "127.0.0.1"
        listener, secret = (_listen(host), secrets.token_hex(16)) if self._rank == 0 else (None, "")
        port = listener.getsockname()[1] if listener else 0
        port, secret = trainer.strategy.broadcast((port, secret))
        if listener:
            self._start(listener, secret)
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
        self._start(None, secret)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, unless this rank only fails because another one did."""
        if self._thread is None:
            return
        self._own_text = str(exception)[: MOST_CHARS // 2]
        if isinstance(exception, KeyboardInterrupt | Stopped):
            # Between steps the ranks have agreed on it; elsewhere the others get no signal of their own.
            signum = exception.signum if isinstance(exception, Stopped) else signal.SIGINT
            self._leaving.set()
            self._tell({"rank": self._rank, "signal": int(signum), "text": f"stopped by {signal.Signals(signum).name}"})
        elif self._heard.wait(1.0):
            self._end(self._stopped)
            if self._failed_alike():
                # The program may catch it, and go on with another fit.
                faulthandler.cancel_dump_traceback_later()
            if isinstance(exception, RuntimeError):  # of the collective that lacks a rank
                all_is_told(exception)
        else:
            text = f"{type(exception).__name__}: {exception}"[:MOST_CHARS]
            self._leaving.set()  # who is told hangs up, which is not its death
            self._tell({"rank": self._rank, "text": text})
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # The connections ---------------------------------------------------------------------------------------------

    def _start(self, listener: socket.socket | None, secret: str) -> None:
        self._thread = threading.Thread(
            target=self._watch, args=(listener, secret), name="hymba-rank-watch", daemon=True
        )
        self._thread.start()

    def _close(self) -> None:
        """Say goodbye, so that the end of this rank is no death."""
        if self._thread is None:
            return
        self._leaving.set()
        self._tell({"done": True})
        self._closing.set()
        self._thread.join()
        self._thread = None

    def _watch(self, listener: socket.socket | None, secret: str) -> None:
        """Takes connections, sends beats, and passes on, from rank 0 to all, what happens to one."""
        with selectors.DefaultSelector() as selector, listener or contextlib.nullcontext():
            for source in [listener] if listener else self._peers:
                selector.register(source, selectors.EVENT_READ)
            still = dict.fromkeys(self._peers, 0.0)
            looked = beaten = stopped = time.monotonic()
            while not self._closing.is_set():
                for key, _ in selector.select(timeout=0.2):
                    connection = cast(socket.socket, key.fileobj)
                    if connection is listener:
                        self._accept(listener, secret, selector, still)
                        continue
                    still[connection] = 0.0
                    message = _receive(connection)
                    if message is None or not message.get("beat"):
                        self._hang_up(connection, message, selector)
                        del still[connection]
                now = time.monotonic()
                stopped = stopped if self._stopped else now
                if now - stopped > SIGNAL_SECONDS and not self._leaving.is_set():
                    self._end(self._stopped)
                # Where this process was stopped, too, the time tells nothing of the others.
                passed, looked = min(now - looked, 1.0), now
                for connection in still:
                    still[connection] += passed
                    if still[connection] > self.still_seconds and not self._news.is_set():
                        rank = self._peers[connection]
                        self._report({"rank": rank, "text": STANDS_STILL.format(self.still_seconds)})
                        # It would stay as it is, with all its memory, when nobody is left to wait for it.
                        if 1 <= rank <= len(self._started):
                            self._started[rank - 1].kill()
                if now - beaten > BEAT_SECONDS:
                    beaten = now
                    self._tell({"beat": True})
            for connection in list(self._peers):
                connection.close()

    def _accept(
        self,
        listener: socket.socket,
        secret: str,
        selector: selectors.BaseSelector,
        still: dict[socket.socket, float],
    ) -> None:
        connection, _ = listener.accept()
        connection.settimeout(5.0)
        hello = _receive(connection) or {}
        if hello.get("secret") != secret:
            connection.close()
            return
        connection.settimeout(None)
        _keep_alive(connection)
        self._peers[connection], still[connection] = int(hello["rank"]), 0.0
        selector.register(connection, selectors.EVENT_READ)

    def _hang_up(
        self, connection: socket.socket, message: dict[str, Any] | None, selector: selectors.BaseSelector
    ) -> None:
        """A rank has said its last word, or is gone without one."""
        selector.unregister(connection)
        rank = self._peers.pop(connection)
        connection.close()
        # Who was told of a signal hangs up too.
        silent = message is None and not self._stopped
        if (silent or "text" in (message or {})) and not self._leaving.is_set():
            self._report(message or {"rank": rank, "text": SILENT})

    def _report(self, news: dict[str, Any]) -> None:
        if not self._rank:
            self._tell(news)
        if "signal" not in news:
            self._end(news)
        elif not self._stopped:
            self._stopped = news
            self._heard.set()

    def _tell(self, message: dict[str, Any]) -> None:
        with self._sending:
            for connection in list(self._peers):
                _send(connection, message)

    def _end(self, news: dict[str, Any]) -> None:
        """Say who died, and end this process should it not do so by itself."""
        if self._news.is_set():
            return
        self._news.set()
        self._text = news["text"]
        self._heard.set()
        if "signal" in news:
            signals.follow(news["signal"])
        saved = signals.last_saved()
        if self._failed_alike():
            return
        log.error(
            "rank %d of %d died (%s). Rank %d ends too%s",
            news["rank"],
            self._size,
            news["text"],
            self._rank,
            f"; --ckpt_path last goes on from step {saved.step}" if saved else "",
        )
        # Not a Python timer: its thread would need the interpreter, which a rank that stands still in a driver's call
        # may hold for ever. This one needs nothing, and shows where every thread stood.
        faulthandler.dump_traceback_later(max(self.grace_seconds, 0.001), exit=True, file=sys.__stderr__ or 2)

    def _failed_alike(self) -> bool:
        """Whether what ended another rank is what this one failed with: each says so by itself, and none waits."""
        return bool(self._own_text) and self._own_text in self._text


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
