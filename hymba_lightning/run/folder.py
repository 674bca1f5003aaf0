"""The folder of a run: what lies where in it, who writes to it, and what a new run in it takes away first."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from hymba_lightning.checkpoints import has_digest
from hymba_lightning.claim import LOCK, OWNER, FolderClaim, missing_folders
from hymba_lightning.files import write_atomic
from hymba_lightning.run.record import RecordError, RunRecord

ARTIFACT = "artifact.hymba"
# Names the folders below the run's in which loggers wrote for it.
LOGGED = ".loggers.json"
# Everything that a fit, validate, test or probe writes. Logger files are those of loggers that write to the folder
# itself.
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
    "probe.json",
    "probe.png",
    LOGGED,
    ARTIFACT,
    "checkpoints",
)
LOGGERS = ("events.out.tfevents.*", "hparams.yaml", "lightning_logs/version_*", "wandb/*run-*", "mlruns", "mlflow.db")
# What those write into a folder that they were given a name for.
LOGGER_FILES = ("events.out.tfevents.*", "hparams.yaml", "metrics.csv")
# Where an old run lies until the new one in its place has made a step.
ASIDE = ".before"
# The first line of a config that a fit wrote; one without it was written by hand.
WRITTEN = "# lightning.pytorch=="
# What a fit alone leaves.
SIGNS = ("summary.json", ARTIFACT)


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
        self.path = Path(os.path.expanduser(path))
        self.log_dirs: list[Path] = []
        """Where the loggers of the present stage write."""
        self._loggers = loggers
        self._logged = self._logger_files() if loggers else []
        self._made = missing_folders(self.path) if loggers else []
        self.overwrite = overwrite
        self._claim: FolderClaim | None = None
        self._abandoned = False
        """Whether the owner before was killed: a clean end takes its note away."""
        self._before: set[Path] | None = None
        """What lay here when a new run began that has not made a step."""

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
        """Names of what shows that a fit began here, and would be lost: not the results of a validation or a test, nor
        the config of a fit that ended before it saved anything."""
        held = [name for name in SIGNS if (self.path / name).exists()]
        if any(not path.name.startswith(".") for path in self.path.glob("checkpoints/*")):
            held.insert(0, "checkpoints")
        if (self.path / "record.json").exists():
            try:
                record = RunRecord.load(self.path)
                fitted = record.trained is not None or record.artifact is not None
            except RecordError:
                fitted = True
            held = ["record.json", *held] if fitted else held
        if (self.path / "config.yaml").exists() and (held or not self._config_is_ours(WRITTEN, "run_dir:")):
            held.append("config.yaml")
        return held

    def _config_is_ours(self, *beginnings: str) -> bool:
        """Whether config.yaml is of a fit, rather than of another program: some of its lines begin with these words."""
        if self._abandoned if self.is_open else (self.path / OWNER).is_file():
            return True
        with contextlib.suppress(OSError):
            lines = (self.path / "config.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
            return all(any(line.startswith(words) for line in lines) for words in beginnings)
        return False

    def _is_a_run(self) -> bool:
        """Whether this package wrote what lies here; other programs have a config.yaml and checkpoints too."""
        if any((self.path / name).exists() for name in ("record.json", ARTIFACT, LOGGED, ASIDE)):
            return True
        return self._config_is_ours("run_dir:") or has_digest(self.checkpoint)

    def check(self, resumed_from: str | Path | None = None) -> None:
        """Whether a fit may write here: into a folder without a run, on from its own checkpoint, or to overwrite it.

        Raises:
            FolderInUseError: another process is writing the run that it holds.
            RunExistsError: the folder holds a run that `resumed_from` is no checkpoint of, or another program's files
                under names that a run would write.
        """
        if self.owns(resumed_from):
            return
        held = self.held()
        if held and not self._is_a_run():
            raise RunExistsError(
                f"{self.path} holds {', '.join(held)} that no run of this package wrote: choose another --run_dir"
            )
        if not held or self.overwrite:
            return
        if not self.is_open:
            with FolderClaim(self.path, "a look at the folder"):
                pass
        remedy = "go on with --ckpt_path last, choose another --run_dir, or give --overwrite true"
        if resumed_from is not None:
            remedy = f"{resumed_from} is another run's checkpoint; choose another --run_dir, or give --overwrite true"
        raise RunExistsError(f"{self.path} already holds a run ({', '.join(held)}): {remedy}")

    def claim(self, work: str) -> None:
        """Locks the folder for this process, unless it has done so already.

        Raises:
            FolderInUseError: another process writes here.
            OSError: the folder cannot be made.
        """
        if self._claim is None:
            claim, abandoned = FolderClaim(self.path, work, self._made), (self.path / OWNER).is_file()
            claim.take()
            self._abandoned = abandoned
            self._claim = claim
            # What killed writers left half done; nobody else writes here now.
            self._put_back()
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
            self._note_loggers()
            return
        if self.overwrite and self._is_a_run():
            for path in dict.fromkeys([*self._files(), *(path for path in self._logged if path.exists())]):
                aside = self.path / ASIDE / path.relative_to(self.path)
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, aside)
                _remove_empty(path.parent, self.path)
        self._before = set(self._files())
        self._note_loggers()
        if not self.held():
            self._before.discard(self.path / "config.yaml")

    def settle(self) -> None:
        """Deletes what was kept of the run that this one replaces, once this one has made its first step."""
        self._before = None
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)

    def restore(self) -> None:
        """Undoes a stage that came to nothing: deletes what it wrote, and puts back what it had moved aside."""
        new = set() if self._before is None else set(self._files()) - self._before
        if self._loggers:
            new |= set(self._logger_files()) - set(self._logged)
        for path in new:
            _remove(path)
        for folder in [*(path.parent for path in new), *self.log_dirs]:
            if self.path in folder.parents:
                _remove_empty(folder, self.path)
        self._before = None
        self._put_back()

    def _put_back(self) -> None:
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
        """The files of a run in this folder, its artifact under any name."""
        found = [path for pattern in OURS for path in self.path.glob(pattern)]
        try:
            named = RunRecord.load(self.path).artifact
        except RecordError:
            named = None
        if named is not None and not Path(named.file).is_absolute() and (self.path / named.file).is_file():
            found.append(self.path / named.file)
        return list(dict.fromkeys(found))

    def _note_loggers(self) -> None:
        """Writes down where loggers write below this folder, so that a run that takes its place finds it."""
        names = self._logger_folders()
        if names:
            write_atomic(self.path / LOGGED, json.dumps(sorted(names)) + "\n")

    def _logger_files(self) -> list[Path]:
        """What loggers wrote here of a run."""
        places = [(self.path, LOGGERS), *((self.path / name, LOGGER_FILES) for name in self._logger_folders())]
        return [found for folder, patterns in places for pattern in patterns for found in folder.glob(pattern)]

    def _logger_folders(self) -> set[str]:
        """Paths below the run's folder: of loggers now, and of those that were written down."""
        root = self.path.resolve()
        inside = [path.resolve() for path in self.log_dirs if root in path.resolve().parents]
        try:
            noted = json.loads((self.path / LOGGED).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            noted = []
        noted = [name for name in noted if isinstance(name, str)] if isinstance(noted, list) else []
        noted = [name for name in noted if not {"..", "/"} & set(Path(name).parts)]
        return {*noted, *(str(path.relative_to(root)) for path in inside)}


def _remove_empty(folder: Path, above: Path) -> None:
    """A folder in which nothing is left, and those around it below `above`."""
    with contextlib.suppress(OSError):
        while folder != above:
            folder.rmdir()
            folder = folder.parent


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
