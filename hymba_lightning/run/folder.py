"""The folder of a run: what lies where in it, who writes to it, and what a new run in it takes away first."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from hymba_lightning.claim import LOCK, OWNER, FolderClaim
from hymba_lightning.run.record import RecordError, RunRecord

ARTIFACT = "artifact.hymba"
# Everything that a fit, validate or test writes. Logger files are those of loggers that write to the folder itself.
OURS = (
    "record.json",
    "summary.json",
    "test_summary.json",
    "history.json",
    "config.yaml",
    "validate_config.yaml",
    "test_config.yaml",
    "training.png",
    "ttt.png",
    "context.png",
    "nats.npy",
    ARTIFACT,
    "checkpoints",
)
LOGGERS = ("events.out.tfevents.*", "hparams.yaml", "lightning_logs/version_*")
# Where an old run lies until the new one in its place has made a step.
ASIDE = ".before"
# What shows that a folder holds a run.
SIGNS = ("record.json", "summary.json", "checkpoints", "config.yaml", ARTIFACT)


class RunExistsError(FileExistsError):
    """The folder holds a run that would be overwritten."""


class RunFolder:
    """Paths of a run's files, wherever the loggers write theirs.

    Args:
        path: The folder; made by `claim`.
        overwrite: Let a new run take the place of one that the folder holds.
        loggers: Whether what loggers wrote here so far belongs to that run. Say so only before the Trainer makes its
            loggers, whose new files lie beside the old.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, loggers: bool = False) -> None:
        self.path = Path(path)
        self._logged = [found for pattern in LOGGERS for found in self.path.glob(pattern)] if loggers else []
        self.overwrite = overwrite
        self._claim: FolderClaim | None = None

    def __truediv__(self, name: str | Path) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to go on from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def is_open(self) -> bool:
        """Whether this process may write here."""
        return self._claim is not None

    def owns(self, checkpoint: str | Path | None) -> bool:
        """Whether a checkpoint lies in this folder, so that a fit from it goes on with this run."""
        return checkpoint is not None and self.path.resolve() in Path(checkpoint).resolve().parents

    @staticmethod
    def is_ours(name: str) -> bool:
        """Whether a run keeps something under this name at the top of its folder."""
        return any(fnmatch(name, pattern) for pattern in (*OURS, *LOGGERS, LOCK, OWNER, ASIDE))

    def held(self) -> list[str]:
        """Names of what shows that a run is in the folder already."""
        return [name for name in SIGNS if (self.path / name).exists()]

    def check(self, resumed_from: str | Path | None = None) -> None:
        """Whether a fit may write here: into a folder without a run, on from its own checkpoint, or to overwrite it.

        Raises:
            RunExistsError: the folder holds a run that `resumed_from` is no checkpoint of.
        """
        if self.owns(resumed_from):
            return
        held = self.held()
        if not held or self.overwrite:
            return
        remedy = "go on with --ckpt_path last, choose another --run_dir, or give --overwrite true"
        if resumed_from is not None:
            remedy = f"{resumed_from} is another run's checkpoint; choose another --run_dir, or give --overwrite true"
        raise RunExistsError(f"{self.path} already holds a run ({', '.join(held)}): {remedy}")

    def claim(self, work: str) -> None:
        """Takes the folder for this process; nothing happens where it has it already.

        Raises:
            FolderInUseError: another process writes here.
            OSError: the folder cannot be made.
        """
        if self._claim is None:
            claim = FolderClaim(self.path, work)
            claim.take()
            self._claim = claim
            # What killed writers left half done; nobody else writes here now.
            self.restore()
            for name in [*OURS, *(path.name for path in self._files())]:
                for leftover in self.path.glob(f".{name}.????????"):
                    leftover.unlink(missing_ok=True)

    def start(self, resumed_from: str | Path | None = None) -> None:
        """Begins a fit: puts aside what an old run left, unless the fit goes on with it. `settle` or `restore` follows.

        Raises:
            RunExistsError: as `check` does.
        """
        self.check(resumed_from)
        if self.owns(resumed_from):
            return
        for path in [*self._files(), *(path for path in self._logged if path.exists())]:
            aside = self.path / ASIDE / path.relative_to(self.path)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside)

    def settle(self) -> None:
        """The new run has begun for good: what it took the place of goes."""
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)

    def restore(self) -> None:
        """Puts back what a run took the place of that came to nothing; what it wrote itself goes."""
        if not (self.path / ASIDE).is_dir():
            return
        for path in self._files():
            _remove(path)
        for aside in (self.path / ASIDE).rglob("*"):
            path = self.path / aside.relative_to(self.path / ASIDE)
            if path.parent != self.path and aside.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
            if aside.is_file() or aside.is_symlink():
                os.replace(aside, path)
        shutil.rmtree(self.path / ASIDE)

    def close(self) -> None:
        """Lets others write."""
        if self._claim is not None:
            self._claim.release()
        self._claim = None

    def _files(self) -> list[Path]:
        """What lies here of a run, whatever name it gave its artifact."""
        found = [path for pattern in OURS for path in self.path.glob(pattern)]
        try:
            named = RunRecord.load(self.path).artifact
        except RecordError:
            named = None
        if named is not None and not Path(named.file).is_absolute() and (self.path / named.file).is_file():
            found.append(self.path / named.file)
        return list(dict.fromkeys(found))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
