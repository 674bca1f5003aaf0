"""The `hymba` command: LightningCLI with the callbacks of a run, and artifacts wherever a checkpoint is taken."""

import datetime
import logging
import os
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.callbacks.lightning_signals import leave_signals_to_us
from hymba_lightning.callbacks.progress import BudgetProgressBar
from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.model import HymbaConfig
from hymba_lightning.options import check_config_files
from hymba_lightning.quantization import is_artifact, load_artifact
from hymba_lightning.training.memory import check_memory, estimate_memory, free_memory
from hymba_lightning.training.module import HymbaModule
from hymba_lightning.training_options import TrainingParser

log = logging.getLogger("hymba_lightning")

# The docstring below each field of a config is its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

# A checkpoint is a file from anywhere: tensors and plain values are built from it, nothing in it is executed.
SAFE = {"weights_only": True}

SUBCOMMANDS = ("fit", "validate", "test")

# Ranks that Lightning starts inherit the environment: it tells them the folder that rank 0 named after its start time.
RUN_DIR_VARIABLE = "HYMBA_RUN_DIR"


class RunConfig(SaveConfigCallback):
    """Saves the resolved config into the run's folder: config.yaml for fit, <stage>_config.yaml otherwise."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.config_filename = "config.yaml" if stage == "fit" else f"{TrainerFn(stage).value}_config.yaml"
        super().setup(trainer, pl_module, stage)


class HymbaCLI(LightningCLI):
    """fit, validate and test on a HymbaModule and a HymbaDataModule.

    Args:
        command: The only subcommand to build a parser for, which takes a second or more each; another name builds all.
    """

    def __init__(self, *args: Any, command: str, **kwargs: Any) -> None:
        self._command = command
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        names = (self._command,) if self._command in SUBCOMMANDS else SUBCOMMANDS
        not_options = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only",
                       "verbose"}
        return dict.fromkeys(names, not_options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None,
                            help="Folder of the run: config, checkpoints, logs, artifact, summary, plots "
                                 "(default: runs/<date>-<time>)")
        parser.add_argument("--overwrite", type=bool, default=False,
                            help="Let fit start anew in a folder that holds a run already")
        parser.add_argument("--check_memory", type=bool, default=True,
                            help="Refuse a fit on the CPU that needs far more memory than is free")
        parser.add_lightning_class_args(TrainingCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportArtifact, "export")
        parser.add_lightning_class_args(BudgetProgressBar, "progress")
        parser.add_lightning_class_args(RunSummary, "summary")
        # One endless pass over the data: the clock or max_steps ends a run, not an epoch.
        parser.set_defaults({"trainer.max_epochs": 1, "trainer.use_distributed_sampler": False,
                             "trainer.num_sanity_val_steps": 0, "trainer.enable_model_summary": False,
                             "trainer.check_val_every_n_epoch": None})

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would let a checkpoint's hyper-parameters override explicit flags; here flags win, and
        HymbaModule.on_load_checkpoint refuses a checkpoint that does not fit them."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder = self._get(self.config_init, "run_dir") or os.environ.get(RUN_DIR_VARIABLE)
        if folder is None:
            folder = str(Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S"))
        os.environ[RUN_DIR_VARIABLE] = folder
        self.run_dir = Path(folder)
        trainer_config = self._get(self.config_init, "trainer", default={})
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        kwargs["default_root_dir"] = folder
        trainer = super().instantiate_trainer(**kwargs)
        leave_signals_to_us(trainer)
        return trainer

    # What the subcommands do beyond Trainer.fit/validate/test --------------------------------------------------------

    def fit(self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Trains. `--ckpt_path last` goes on from the run folder's last checkpoint."""
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if ckpt_path == "last":
            if not last.is_file():
                raise FileNotFoundError(f"{last} does not exist: --ckpt_path last needs the --run_dir of a run")
            ckpt_path = str(last)
        if ckpt_path is not None and not Path(ckpt_path).is_file():
            raise FileNotFoundError(f"--ckpt_path {ckpt_path} does not exist")
        if ckpt_path is not None and is_artifact(ckpt_path):
            raise ValueError(f"--ckpt_path {ckpt_path} is an artifact, which holds no state of training: fit goes on "
                             "from a checkpoint, e.g. --ckpt_path last")
        held = [name for name in ("summary.json", "checkpoints") if (self.run_dir / name).exists()]
        if ckpt_path is None and held and not self._get(self.config_init, "overwrite"):
            raise FileExistsError(f"{self.run_dir} already holds a run ({', '.join(held)}): go on with --ckpt_path "
                                  "last, choose another --run_dir, or give --overwrite true")
        if self._get(self.config_init, "check_memory") and self.trainer.strategy.root_device.type == "cpu":
            estimate = estimate_memory(model.net.config, model.net.runtime, datamodule.seq_len,
                                       datamodule.micro_batch_size)
            check_memory(estimate, free_memory(), self.trainer.num_devices)
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs, **SAFE)

    def validate(self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None,
                 **kwargs: Any) -> None:
        """Scores a checkpoint or an artifact on the validation stream."""
        ckpt_path = self._load_weights(model, datamodule, ckpt_path)
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=True, **kwargs, **SAFE)

    def test(self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None,
             **kwargs: Any) -> None:
        """Scores a checkpoint or an artifact chunk by chunk with test-time training in between."""
        ckpt_path = self._load_weights(model, datamodule, ckpt_path)
        self.trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, **kwargs, **SAFE)

    def _load_weights(self, model: HymbaModule, data: HymbaDataModule, path: str | None) -> str | None:
        """Takes an artifact's network into `model`; a checkpoint's path goes back for Lightning to load."""
        if path is None:
            raise ValueError("nothing to score: give --ckpt_path with an artifact or a checkpoint")
        if path == "last":
            path = str(self.run_dir / "checkpoints" / "last.ckpt")
        if not Path(path).is_file():
            raise FileNotFoundError(f"--ckpt_path {path} does not exist")
        model.weights_from = path
        if not is_artifact(path):
            return path
        artifact = load_artifact(path)
        if artifact.tokenizer.get("sha256") is None:
            log.warning("%s does not say which tokenizer it was made for: its score means something only with that one",
                        path)
        elif artifact.tokenizer["sha256"] != data.tokenizer_fingerprint():
            raise ValueError(f"{path} was made for another tokenizer (sha256 {artifact.tokenizer.get('sha256')}) than "
                             f"the data's ({data.tokenizer_fingerprint()}): give --data.tokenizer the right one")
        model.use_network(HymbaConfig.from_dict(artifact.config), artifact.state_dict)
        return None


def run(args: list[str]) -> HymbaCLI:
    """Runs one of LightningCLI's subcommands."""
    check_config_files(args)
    return HymbaCLI(HymbaModule, HymbaDataModule, args=args, command=args[0], seed_everything_default=1337,
                    parser_class=TrainingParser, save_config_callback=RunConfig,
                    save_config_kwargs={"overwrite": True}, parser_kwargs={"prog": "hymba"})
