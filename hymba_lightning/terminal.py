"""Messages on the terminal: ours as plain lines on stderr, without the tips that libraries print."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

# Parts of library messages that tell a user of this command nothing.
NOISE = (
    "litlogger",
    "TPU available",
    "GPU available",
    "Tensor Cores",
    "`Trainer.fit` stopped: `max_epochs=1`",
    "Seed set to",
    "Initializing distributed:",
    "distributed_backend=",
    "All distributed processes registered",
    "LOCAL_RANK:",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "`Trainer.fit` stopped: `max_steps=",
    "-" * 20,
)
# Warnings of libraries about what this package does on purpose, or about their own insides.
QUIET_WARNINGS = (
    "LightningCLI's args parameter",
    r".*isinstance\(treespec, LeafSpec\)",
    ".*does not have many workers",
    r".*Checkpoint directory .* exists and is not empty",
    ".*You have overridden .* `configure_callbacks`",
    ".*Starting from v1.9.0, `tensorboardX`",
    r".*`training_step` returned `None`",
    ".*`lr_scheduler.step\\(\\)`",
    ".*is incompatible with the `torch.compile`",
    ".*The `srun` command is available on your system",
    ".*pkg_resources is deprecated",
    ".*pynvml package is deprecated",
    ".*Please use the new API settings to control",
    # Scores are summed over the ranks before they are logged.
    r".*It is recommended to use `self.log\('val(_ttt)?/",
)


class StderrHandler(logging.Handler):
    """Prints to sys.stderr as it is when a message comes, so that a live progress bar can put it above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def not_noise(record: logging.LogRecord) -> bool:
    """False for a library's message that `NOISE` knows."""
    if record.name.partition(".")[0] == "hymba_lightning":
        return True
    text = record.getMessage()
    return bool(text.strip()) and not any(part in text for part in NOISE)


def set_up_messages(quiet: bool = False) -> None:
    """Prints log messages and warnings as plain lines on stderr, once, and keeps the libraries' noise away.

    Args:
        quiet: Only warnings and errors.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, StderrHandler) for handler in root.handlers):
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(not_noise)
        root.addHandler(handler)
    logging.getLogger("hymba_lightning").setLevel(logging.WARNING if quiet else logging.INFO)
    warnings.showwarning = _show_warning
    # Python's -W error is for one's own code: what libraries warn of would end a command in the middle.
    if any(entry[0] == "error" for entry in warnings.filters):
        warnings.simplefilter("default")
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)


def take_over_lightnings_messages(rank: Callable[[], int] = lambda: 0) -> None:
    """Removes the handlers that importing Lightning installs, which would print its messages a second time, and keeps
    what every rank would say to rank 0; warnings may be of one rank alone.

    Args:
        rank: Says which this process is.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler):
            handler.addFilter(lambda record: record.levelno >= logging.WARNING or rank() == 0)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = " ".join(str(message).split())
    print(f"warning: {text}", file=file or sys.stderr, flush=True)
