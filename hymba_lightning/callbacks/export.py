"""After training: weights → artifact on disk → reloaded → scored, each stage's bits per byte by itself."""

import os

import lightning.pytorch as pl

from hymba_lightning.callbacks.owner import FolderOwner, settle
from hymba_lightning.files import check_place
from hymba_lightning.quantization import QuantizationConfig
from hymba_lightning.run.calibration import rehearse
from hymba_lightning.run.finish import ExportSettings, finish
from hymba_lightning.run.folder import ARTIFACT, RunFolder
from hymba_lightning.run.run import Run, require_clock
from hymba_lightning.trainer_internals import end_where_nothing_is_left, is_trial


class ExportArtifact(FolderOwner):
    """Has the averaged weights quantized, written to one file, reloaded and scored at the end of training.

    Works outside the budget (see run/finish.py for the order). Scores the raw last-step weights, the averaged weights
    and the reloaded artifact on the validation stream.

    Args:
        enabled: Write an artifact at the end of training; otherwise only the weights are scored.
        filename: The artifact's name in the run's folder, or an absolute path.
        quantization: How the weights are stored, and the limit in bytes.
        calibration_batches: Training batches, over all ranks, on which GPTQ measures the layers' inputs
            (and 'mixed' what each weight matters).
            The seconds this takes count as training time: hold them back with model.reserve_seconds. Where that ends
            first, fewer batches are taken.
        score_stages: Score raw, averaged and reloaded weights; each takes one pass over the validation stream.

    Raises:
        ValueError: a number that cannot be.
    """

    def __init__(
        self,
        enabled: bool = True,
        filename: str = "artifact.hymba",
        quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 - frozen
        calibration_batches: int = 16,
        score_stages: bool = True,
    ) -> None:
        if calibration_batches < 1:
            raise ValueError(f"export.calibration_batches is {calibration_batches}; it must be at least 1")
        if not filename or filename.endswith("/"):
            raise ValueError(f"export.filename is {filename!r}; it must name a file, e.g. artifact.hymba")
        filename = os.path.expanduser(filename)
        self.settings = ExportSettings(enabled, filename, quantization, calibration_batches, score_stages)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_filename(Run.of(trainer).folder_of(trainer))
        super().setup(trainer, pl_module, stage)
        Run.of(trainer).export = self.settings
        if stage == "fit":
            expect_end(trainer)

    def _check_filename(self, folder: RunFolder) -> None:
        """
        Raises:
            ValueError: the artifact would take the place of a folder or of another file of the run.
            OSError: of a device or a pipe.
        """
        path = (folder / self.settings.filename).resolve()
        name = str(path.relative_to(folder.path.resolve())) if folder.path.resolve() in path.parents else ""
        first = name.split("/")[0]
        if path.is_dir() or path == folder.path.resolve() or (name != ARTIFACT and first and folder.is_ours(first)):
            raise ValueError(
                f"export.filename is {self.settings.filename!r}, which is a folder or another file of the "
                "run: give the artifact a name of its own, e.g. artifact.hymba"
            )
        check_place(folder / self.settings.filename)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On a GPU, calibrates once before the clock starts, since compiling for it would not fit into the reserve."""
        wanted = self.settings.enabled and self.settings.quantization.calibrated and not is_trial(trainer)
        if wanted and pl_module.device.type == "cuda":
            with Run.of(trainer).phases.inside("warm_up"):
                rehearse(trainer, pl_module, self.settings.quantization, self.settings.calibration_batches)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        end_run(trainer, pl_module)


def expect_end(trainer: pl.Trainer) -> None:
    """Has `end_run` called once at the end of the coming fit, even one that resumes with no step left to do."""
    run = Run.of(trainer)
    if not run.ends:
        end_where_nothing_is_left(trainer)
        run.before_end = []
    run.ends, run.ended = True, False


def end_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Finishes the run, once for each fit. A run that a signal stopped is left as it is, to be resumed.

    Raises:
        What `finish` raises.
    """
    run = Run.of(trainer)
    if run.ended or is_trial(trainer) or require_clock(run).stop_code:
        return
    run.ended, run.ends = True, False
    settle(trainer)
    for prepare in run.before_end:
        prepare()
    finish(trainer, pl_module, run.export or ExportSettings(enabled=False, score_stages=False), run.plots)
