"""Preloaded by the server of `fit_process`: the docstrings of all options are parsed before it forks for a command."""

import contextlib
import importlib

importlib.import_module("docstrings_kept")
cli = importlib.import_module("hymba_lightning.cli")
with contextlib.suppress(cli.UsageError):
    cli.run(["fit", "--no_such_option"])
