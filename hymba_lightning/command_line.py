"""The `hymba` command from its arguments to its exit code. Imports nothing heavy until it knows what is asked."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from hymba_lightning import errors, signals, streams, usage
from hymba_lightning.help_text import quick_help
from hymba_lightning.imports import import_torchmetrics_in_parts, uncollected
from hymba_lightning.terminal import set_up_messages, take_over_lightnings_messages

# Nothing but their output: when nobody reads it, they end.
FILTERS = ("bpb", "inspect", "sample")
# What they print is a result too, but not one to end hours of work for; that it was lost is told at their end.
TELL = ("audit", "study")
OF_LIGHTNING = ("fit", "validate", "test")


def main() -> None:
    """Runs the command line in sys.argv.

    Raises:
        SystemExit: with 2 for bad input, 1 for a fault of the program, 128 + its number for a signal.
    """
    started = time.monotonic()
    if streams.ascii_locale():
        streams.start_again_in_utf8()
    args = usage.as_meant([arg for arg in sys.argv[1:] if arg != "--debug"])
    command = args[0]
    streams.guard(must_arrive=command in FILTERS or command.startswith("-") or args[-1] in ("-h", "--help"))
    title = f"hymba {command}" if command in usage.COMMANDS else "hymba"
    signals.listen(title)
    if signals.launched_by_lightning():
        signals.end_with_parent(title)
    try:
        code = _run_guarded(args, command, title, started, debug="--debug" in sys.argv)
    except signals.Stopped as stop:  # in the middle of other last words
        code = _stopped(args, title, stop.signum)
    signals.all_is_said(title)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if code:
        sys.exit(code)


def _run_guarded(args: list[str], command: str, title: str, started: float, debug: bool) -> int:
    """Runs the command, prints the message for what ended it (an error, a signal), and returns the exit code."""
    try:
        try:
            _run(args, command, started)
        except SystemExit as end:
            # A parser's help.
            if not end.code:
                streams.check_arrived()
            raise
        if command in TELL:
            streams.check_arrived()
        sys.stdout.flush()
    except BaseException as error:
        # The ranks of a run end by the signal that one of them got.
        signum = error.signum if isinstance(error, signals.Stopped) else signals.pending()
        if signum or isinstance(error, KeyboardInterrupt):
            return _stopped(args, title, signum or 2)
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        if streams.broken_pipe(error):
            return 128 + 13  # as if SIGPIPE had ended it, which is what shells expect of a filter
        code = errors.report(error, title, debug)
        if code == errors.USER_ERROR and signals.launched_by_lightning():
            signals.wait_for_parent()
        return code
    return 0


def _run(args: list[str], command: str, started: float) -> None:
    if command in ("-h", "--help"):
        print(usage.overview(), end="")
        return
    if command == "--version":
        print(usage.versions())
        return
    usage.check_command(command, args[1:])
    usage.check_environment(command)
    set_up_messages(quiet=command in FILTERS)
    text = quick_help(args)
    if text is not None:
        print(text, end="")
        return
    # A backend that this environment names may not exist; ours draw into files and need none.
    os.environ["MPLBACKEND"] = "agg"
    if command in OF_LIGHTNING:
        with uncollected():
            import_torchmetrics_in_parts()
            from lightning.pytorch.utilities import rank_zero_only

            from hymba_lightning.cli import run

        take_over_lightnings_messages(lambda: getattr(rank_zero_only, "rank", 0))
        _say_what_is_next(run(args, started))
        return
    if command == "study":
        from hymba_lightning import studies

        studies.run(args[1:])
        return
    from hymba_lightning.commands import run_command

    run_command(command, args[1:])


def _say_what_is_next(cli: Any) -> None:
    """Prints the commands that usually follow a fit, after one that was not interrupted."""
    if cli is None or cli.subcommand != "fit" or not cli.trainer.is_global_zero or cli.trainer.fast_dev_run:
        return
    artifact = cli.artifact()
    print(usage.after_fit(cli.folder.path, artifact))


def _stopped(args: list[str], title: str, signum: int) -> int:
    """Last words after a signal: what was saved, and what goes on from there."""
    if not any(signals.ranks()):
        name = signals.signal_name(signum)
        print(f"{title}: {usage.after_stop(args, name, signals.last_saved())}", file=sys.stderr)
    if signals.launched_by_lightning():
        signals.wait_for_parent()
    return 128 + signum
