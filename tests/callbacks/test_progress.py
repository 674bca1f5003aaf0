"""The live bar, as a terminal gets it: ends at 100 %, and never in the middle of a line of the log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from types import SimpleNamespace

import pytest
from fit_process import typed, write_config

from hymba_lightning.callbacks import progress
from hymba_lightning.callbacks.progress import BudgetProgressBar
from hymba_lightning.run import Run


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Runs a command with a pseudo-terminal for its output; exit code and what it wrote, without escape sequences."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    ) as process:
        os.close(follower)
        written = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # the other end is closed
                break
            written += part
        code = process.wait(timeout=60)
    os.close(leader)
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def test_the_bar_of_training_ends_at_100_percent_whatever_the_last_step_showed(monkeypatch):
    """Steps between two refreshes are not shown, and the clock of a run that max_steps ends is not at its end."""
    shown = []
    bar = BudgetProgressBar()
    monkeypatch.setattr(bar, "_show", lambda label, done, total, detail, **_: shown.append((label, done / total)))
    monkeypatch.setattr(progress, "_training_detail", lambda trainer: "step 3")
    trainer = SimpleNamespace()
    bar.on_train_start(trainer, None)
    for end in Run.of(trainer).before_end:
        end()
    assert shown == [("training", 1.0)]


@pytest.mark.more
def test_bars_end_at_100_percent_and_leave_log_lines_alone(tmp_path):
    config = write_config(tmp_path)
    code, text = on_a_terminal(
        typed(
            config,
            tmp_path / "run",
            *("--trainer.max_steps", "5", "--export.enabled", "true", "--progress.refresh_seconds", "0.001"),
            *("--trainer.val_check_interval", "2"),
        )
    )
    assert code == 0, text
    lines = re.split(r"[\r\n]+", text)
    shares = {
        label: [float(share) for line in lines for share in re.findall(rf"{label} .*?([\d.]+)%", line)]
        for label in ("training", "finish")
    }
    assert shares["training"][-1] == shares["finish"][-1] == 100.0
    assert max(shares["training"][:3]) < 100.0
    saved = [line for line in lines if "saved " in line]
    assert len(saved) == 5
    assert all(line.strip().startswith("saved ") for line in saved), saved
    assert all("━" not in line for line in lines if "bits per byte" in line)
