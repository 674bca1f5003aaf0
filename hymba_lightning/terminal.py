"""What reaches the terminal: our messages once, and not the libraries' advertisements."""

from __future__ import annotations

import logging
import warnings

# Parts of library messages that tell a user of this command nothing.
NOISE = ("litlogger", "TPU available", "GPU available: False", "Tensor Cores", "`Trainer.fit` stopped: `max_epochs=1`")


def not_noise(record: logging.LogRecord) -> bool:
    """False for a library's message that `NOISE` knows."""
    text = record.getMessage()
    return not any(part in text for part in NOISE)


def set_up_messages() -> None:
    """Prints this package's log messages as plain lines and keeps the libraries' noise away."""
    own = logging.getLogger("hymba_lightning")
    own.setLevel(logging.INFO)
    own.propagate = False
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch",
                 "lightning.fabric", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(not_noise)
    # We are the program that parses the command line.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
