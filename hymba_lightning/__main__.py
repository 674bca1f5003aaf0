"""Entry point of the `hymba` command."""

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the command line in sys.argv, as `command_line.main` does."""
    # Imports take a while, and Python's own answer to Ctrl-C in them is a traceback.
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, _not_begun)
    from hymba_lightning import command_line

    command_line.main()


def _not_begun(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"hymba: stopped by {signal.Signals(signum).name} before it began\n".encode())
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
