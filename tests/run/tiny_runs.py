"""Runs of a tiny network by the command line's own functions."""

from __future__ import annotations

import shutil

from hymba_lightning.cli import run as cli_run


def hymba(work, command, run_dir, *options):
    """Runs a command; returns the run's folder."""
    cli_run([command, "--config", str(work / "tiny.yaml"), "--run_dir", str(work / run_dir), *options])
    return work / run_dir


def copied(fitted, folder):
    """A copy of a run at `folder`."""
    shutil.copytree(fitted, folder)
    return folder
