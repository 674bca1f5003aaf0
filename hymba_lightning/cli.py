"""The `hymba` command: LightningCLI with the callbacks of a run, and artifacts wherever a checkpoint is taken."""

import importlib
import importlib.util
import inspect
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from hymba_lightning.callbacks.checkpoint import TrainingCheckpoint
from hymba_lightning.callbacks.export import ExportArtifact
from hymba_lightning.callbacks.owner import claim_folder
from hymba_lightning.callbacks.progress import BudgetProgressBar
from hymba_lightning.callbacks.summary import RunSummary
from hymba_lightning.checkpoints import check_tokenizer
from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.errors import UsageError
from hymba_lightning.files import not_a_file, write_atomic
from hymba_lightning.generation.loading import began_elsewhere, load_network, started_from
from hymba_lightning.model import Hymba
from hymba_lightning.options import read_help, with_config_files
from hymba_lightning.quantization import is_artifact, load_artifact
from hymba_lightning.run import Run, RunFolder, RunRecord
from hymba_lightning.run.run import new_folder
from hymba_lightning.trainer_internals import (
    agree_on_rank,
    is_trial,
    leave_signals_to_us,
    make_folders_optional,
    read_whole_numbers_as_such,
    trains_elsewhere,
)
from hymba_lightning.training.memory import check_memory, estimate_memory, free_memory
from hymba_lightning.training.module import HymbaModule
from hymba_lightning.training_options import TrainingParser
from hymba_lightning.usage import without_removed

log = logging.getLogger("hymba_lightning")

# Lightning's own enumerations, such as the default of Timer's interval, are written as the text that they are.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))

# A checkpoint is a file from anywhere: tensors and plain values are built from it, nothing in it is executed.
SAFE = {"weights_only": True}

SUBCOMMANDS = ("fit", "validate", "test")

# Loggers that write to a folder: their option for it, and options that would add folders in between.
LOGGER_FOLDERS = ("save_dir", "root_dir", "dir")


class RunConfig(SaveConfigCallback):
    """Writes the resolved config into the run's folder: config.yaml for fit, <stage>_config.yaml otherwise."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Written at the start of a stage, when nothing can be refused any more; of a fit that goes on, with its first
        step."""
        self._pending = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        run = Run.of(trainer)
        self._pending = run.folder_of(trainer).owns(trainer.ckpt_path)
        if self._pending:
            run.before_finish = [partial(self._write_once, trainer)]
            # Where the run began stays known, also where that is not said again.
            self.config["start_from"] = self.config.get("start_from") or started_from(trainer.ckpt_path)
            return
        run.before_finish = []
        self._write(trainer, "config.yaml")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, "validate_config.yaml")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        # Not before: the options of a test that failed would stand beside the score of an earlier one.
        self._write(trainer, "test_config.yaml")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._write_once(trainer)

    def _write_once(self, trainer: Any) -> None:
        if self._pending:
            self._pending = False
            # A run goes on with the random numbers that it began with, whatever the seed is now.
            if Run.of(trainer).seed is not None:
                self.config["seed_everything"] = Run.of(trainer).seed
            self._write(trainer, "config.yaml")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Done above."""

    def _write(self, trainer: Any, name: str) -> None:
        folder = Run.of(trainer).folder_of(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            text = self.parser.dump(self.config, skip_none=False)
            write_atomic(folder / name, text)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("config", f"```yaml\n{text}\n```")


class HymbaCLI(LightningCLI):
    """fit, validate and test on a HymbaModule and a HymbaDataModule.

    Args:
        command: The only subcommand to build a parser for, which takes a second or more each; another name builds all.
        started: time.monotonic() when the command began; limits on an evaluation's seconds count from it.
    """

    def __init__(self, *args: Any, command: str, started: float | None = None, **kwargs: Any) -> None:
        self._command = command
        self._started = time.monotonic() if started is None else started
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        names = (self._command,) if self._command in SUBCOMMANDS else SUBCOMMANDS
        not_options = {
            "model",
            "dataloaders",
            "train_dataloaders",
            "val_dataloaders",
            "datamodule",
            "weights_only",
            "verbose",
        }
        return dict.fromkeys(names, not_options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: config, checkpoints, logs, artifact, summary, plots (default: runs/<date>-<time>)",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Let fit start anew in a folder that holds a run already"
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="Let fit train on these weights, of an artifact, a checkpoint, a folder of `hymba publish` or "
            "hf:OWNER/NAME, with a clock and an optimizer of its own; model.net is theirs then",
        )
        parser.add_argument(
            "--check_memory",
            type=bool,
            default=True,
            help="Refuse a fit on the CPU that needs far more memory than is free",
        )
        parser.add_lightning_class_args(TrainingCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportArtifact, "export")
        parser.add_lightning_class_args(BudgetProgressBar, "progress")
        parser.add_lightning_class_args(RunSummary, "summary")
        # One endless pass over the data: the clock or max_steps ends a run, not an epoch.
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                "trainer.check_val_every_n_epoch": None,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would let a checkpoint's hyper-parameters override explicit flags; here flags win, and
        HymbaModule.on_load_checkpoint refuses a checkpoint that does not fit them."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """
        Raises:
            UsageError: the arguments cannot be understood, or the seed is none.
        """
        super().parse_arguments(parser, args)
        seed = self.config[self.config["subcommand"]].get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise UsageError(f"--seed_everything is {seed}; it must lie in 0 … 2^32 - 1")

    def before_instantiate_classes(self) -> None:
        """Names the run's folder, and sends the loggers there that were not sent elsewhere."""
        self._start = self._read_start()
        folder = self._get(self.config, "run_dir")
        # Ranks of one run may name it differently here; rank 0's name counts from the moment they can talk.
        overwrite = bool(self._get(self.config, "overwrite", default=False))
        self.folder = RunFolder(folder or new_folder(), overwrite, loggers=True)
        loggers = self._get(self.config, "trainer")["logger"]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and "class_path" in logger:
                send_logger(logger, self.folder.path)

    def _read_start(self) -> tuple[Hymba, str | None] | None:
        """The network of --start_from and its tokenizer's SHA-256; its config becomes the run's."""
        path = self._get(self.config, "start_from")
        if path is None:
            return None
        net, fingerprint = load_network(path)
        if fingerprint is None:
            raise ValueError(
                f"--start_from {path} does not say which tokenizer it was trained with: save the network with it, "
                "net.save_pretrained(FOLDER, tokenizer=MODEL), and start from FOLDER"
            )
        self._get(self.config, "model").net = Namespace(net.config.to_dict())
        return net, fingerprint

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer_config = self._get(self.config_init, "trainer", default={})
        if trainer_config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.folder.path, name="", version="", default_hp_metric=False)
        kwargs["default_root_dir"] = str(self.folder.path)
        trainer = super().instantiate_trainer(**kwargs)
        leave_signals_to_us(trainer)
        agree_on_rank(trainer)
        run = Run.of(trainer)
        run.folder, run.command_started = self.folder, self._started
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        """A progress bar of the user's takes the place of ours; without checkpoints nothing is kept to go on from.

        Raises:
            ValueError: `barebones`, which takes away what a run is made of.
        """
        if config.get("barebones"):
            raise ValueError(
                "trainer.barebones leaves out what a run is made of: use --trainer.logger false, "
                "--trainer.enable_progress_bar false, --trainer.limit_val_batches 0 as you need them"
            )
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        not_ours: tuple[type[Callback], ...] = ()
        if config.get("enable_progress_bar") is False or any(isinstance(callback, ProgressBar) for callback in given):
            not_ours = (BudgetProgressBar,)
        if config.get("enable_checkpointing") is False:
            not_ours = (*not_ours, TrainingCheckpoint)
        # The few batches are an epoch, so that one epoch, our default, would end the run long before its budget.
        if config.get("overfit_batches") and config.get("max_epochs") == 1:
            config["max_epochs"] = -1
        callbacks = [callback for callback in callbacks if not isinstance(callback, not_ours)]
        return super()._instantiate_trainer(config, callbacks)

    # What the subcommands do beyond Trainer.fit/validate/test --------------------------------------------------------

    def fit(self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Trains. `--ckpt_path last` goes on from the run folder's last checkpoint."""
        if ckpt_path == "last":
            ckpt_path = self._last()
        if ckpt_path is not None and not Path(ckpt_path).is_file():
            raise not_a_file(f"--ckpt_path {ckpt_path}", ckpt_path, "a checkpoint")
        if ckpt_path is not None and is_artifact(ckpt_path):
            raise ValueError(
                f"--ckpt_path {ckpt_path} is an artifact, which holds no state of training: fit goes on "
                "from a checkpoint, e.g. --ckpt_path last"
            )
        self.folder.check(ckpt_path)
        given = self._get(self.config_init, "start_from")
        if given is not None and ckpt_path is not None and began_elsewhere(ckpt_path, given):
            raise ValueError(
                f"--ckpt_path {ckpt_path} goes on with a run that did not start from {given}: leave out --start_from, "
                "or --ckpt_path for a run of its own"
            )
        if self._start is not None and ckpt_path is None:
            net, fingerprint = self._start
            check_tokenizer(self._get(self.config_init, "start_from"), fingerprint, datamodule.tokenizer_fingerprint())
            model.net.load_state_dict(net.state_dict())
        if self._get(self.config_init, "check_memory") and self.trainer.strategy.root_device.type == "cpu":
            estimate = estimate_memory(
                model.net.config, model.net.runtime, datamodule.seq_len, datamodule.micro_batch_size
            )
            check_memory(estimate, free_memory(), self.trainer.num_devices)
        with self._claimed():
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs, **SAFE)

    def validate(
        self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None, **kwargs: Any
    ) -> None:
        """Scores a checkpoint or an artifact on the validation stream."""
        ckpt_path = self._load_weights(model, datamodule, ckpt_path)
        with self._claimed():
            self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=True, **kwargs, **SAFE)

    def test(
        self, model: HymbaModule, datamodule: HymbaDataModule, ckpt_path: str | None = None, **kwargs: Any
    ) -> None:
        """Scores a checkpoint or an artifact chunk by chunk with test-time training in between."""
        ckpt_path = self._load_weights(model, datamodule, ckpt_path)
        with self._claimed():
            self.trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, **kwargs, **SAFE)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Claims the run's folder before the Trainer's loggers open their files there: what is refused leaves none."""
        if self.trainer.is_global_zero and not is_trial(self.trainer) and not trains_elsewhere(self.trainer):
            claim_folder(self.trainer, f"hymba {self._command}")
        try:
            yield
        finally:
            self.folder.close()

    def artifact(self) -> Path | None:
        """The file that the fit exported, None where it exported none."""
        # From the file: the ranks may have been processes that this one only started.
        record = RunRecord.load(self.folder.path).artifact
        return None if record is None else self.folder / record.file

    def _last(self) -> str:
        if not self.folder.checkpoint.is_file():
            raise FileNotFoundError(
                f"{self.folder.checkpoint} does not exist: --ckpt_path last needs the --run_dir of a run that has "
                "saved its state; one that was ended before starts again without --ckpt_path"
            )
        return str(self.folder.checkpoint)

    def _load_weights(self, model: HymbaModule, data: HymbaDataModule, path: str | None) -> str | None:
        """Takes an artifact's network into `model`; a checkpoint's path goes back for Lightning to load."""
        if path is None:
            raise ValueError("nothing to score: give --ckpt_path with an artifact or a checkpoint")
        if path == "last":
            path = self._last()
        if not Path(path).is_file():
            raise not_a_file(f"--ckpt_path {path}", path, "an artifact or a checkpoint")
        Run.of(self.trainer).weights_from = Path(path)
        if not is_artifact(path):
            return path
        artifact = load_artifact(path)
        if artifact.tokenizer.get("sha256") is None:
            log.warning(
                "%s does not say which tokenizer it was made for: its score means something only with that one", path
            )
        else:
            check_tokenizer(path, artifact.tokenizer["sha256"], data.tokenizer_fingerprint())
        model.use_network(artifact.network(model.net.runtime))
        return None


def send_logger(logger: Namespace, folder: Path) -> None:
    """Sets a logger's folder to the run's, unless the user named another one than its default."""
    module, _, name = logger.class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    options = logger.get("init_args") or Namespace()
    for option in LOGGER_FOLDERS:
        default = parameters[option].default if option in parameters else None
        if option in parameters and options.get(option) in (None, default):
            options[option] = str(folder / default if isinstance(default, str) else folder)
            # Events of a run that goes on belong together. A CSV file would be written anew each time: it keeps its
            # folder by version.
            for level in ("name", "version"):
                if name == "TensorBoardLogger" and options.get(level) in (None, "lightning_logs"):
                    options[level] = ""
            break
    if name == "MLFlowLogger" and not options.get("tracking_uri") and importlib.util.find_spec("sqlalchemy"):
        # Its folders of files are given up by MLflow itself.
        options["tracking_uri"] = f"sqlite:///{folder / 'mlflow.db'}"
    logger["init_args"] = options


def run(args: list[str], started: float | None = None) -> HymbaCLI:
    """Runs one of LightningCLI's subcommands. `started`: time.monotonic() when the command began."""
    args = with_config_files(args)
    read_help(args)
    read = get_loader("yaml")
    set_loader("yaml", lambda text: without_removed(read(text)), (yaml.YAMLError,))
    make_folders_optional()
    read_whole_numbers_as_such()
    return HymbaCLI(
        HymbaModule,
        HymbaDataModule,
        args=args,
        command=args[0],
        started=started,
        seed_everything_default=1337,
        parser_class=TrainingParser,
        save_config_callback=RunConfig,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "hymba"},
    )
