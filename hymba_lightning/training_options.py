"""The parser of fit, validate and test: its help begins with what most runs need and ends with Lightning's options."""

from __future__ import annotations

import argparse
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from hymba_lightning.options import OneSentence

# What most runs need, in the order in which it is thought of. An option that a command lacks is left out of its help.
COMMON = {
    "config": "settings from a YAML file, such as configs/demo.yaml; options after it win",
    "run_dir": "folder of the run (default: runs/<date>-<time>)",
    "ckpt_path": "",
    "data.data_dir": "folder that `hymba prepare` wrote",
    "data.seq_len": "tokens of context",
    "data.micro_batch_size": "sequences per device and pass",
    "trainer.accumulate_grad_batches": "passes per optimizer step",
    "model.budget_seconds": "training seconds the run may take in all",
    "trainer.max_steps": "optimizer steps, instead of or beside a budget",
    "trainer.devices": "how many GPUs, or processes on the CPU; with several, --trainer.strategy ddp",
    "model.compile": "compile the network with torch.compile",
    "model.ttt.mode": "how test scores: see below",
    "export.quantization.scheme": "how the artifact stores the weights",
    "overwrite": "start anew in a folder that holds a run",
}
# Options of Lightning that mean nothing to these commands; they are still accepted.
NOT_IN_HELP = (
    "trainer.limit_predict_batches",
    "trainer.sync_batchnorm",
    "trainer.reload_dataloaders_every_n_epochs",
    "trainer.use_distributed_sampler",
    "trainer.model_registry",
    "trainer.min_epochs",
    "trainer.min_steps",
)
# The first line of a docstring is no title for a group that stands among others.
TITLES = {"trainer": "Lightning's Trainer (https://lightning.ai/docs explains each at length)", "ckpt_path": "Weights"}
DESCRIPTIONS = {
    "fit": "Train inside a budget, write the artifact, score every stage. Settings come from --config, options win.",
    "validate": "Score a checkpoint or an artifact on the validation text.",
    "test": "Score a checkpoint or an artifact with test-time training, each token before it is learned from.",
}
CKPT_PATH = {
    "fit": "Checkpoint to go on from; 'last' is that of --run_dir",
    "validate": "Artifact or checkpoint to score; 'last' is the checkpoint of --run_dir",
    "test": "Artifact or checkpoint to score; 'last' is the checkpoint of --run_dir",
}


class TrainingParser(OneSentence, LightningArgumentParser):
    """LightningArgumentParser with plain errors and an ordered help."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The common options with one line each, this package's in full, then Lightning's."""
        command = self.prog.split()[-1]
        if command not in CKPT_PATH:
            return super().format_help(formatter)
        self.usage = f"hymba {command} --config FILE [options]"
        self.description = DESCRIPTIONS[command]
        for action in self._actions:
            if action.dest.startswith("trainer.") and action.help and action.help != argparse.SUPPRESS:
                action.help = _first_sentence(action.help)
            if action.dest in NOT_IN_HELP:
                action.help = argparse.SUPPRESS
            if action.dest == "ckpt_path":
                action.help = CKPT_PATH[command]
        for group in self._action_groups:
            dests = [action.dest for action in group._group_actions]
            for dest, title in TITLES.items():
                if dest in dests:
                    group.title = title
        self._action_groups = sorted(self._action_groups, key=_is_lightnings)
        usage, _, rest = super().format_help(formatter).partition("\n\n")
        # Dozens of class names, which an unknown one is answered with.
        rest = re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", rest)
        description, _, rest = rest.partition("\n\n")
        return f"{usage}\n\n{description}\n\n{_common(self, command)}\n{rest}"


def _first_sentence(text: str) -> str:
    """The first sentence; Lightning's manual has the others."""
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


def _is_lightnings(group: Any) -> bool:
    """Sort key of an option: Lightning's own come after ours."""
    return any(
        action.dest.partition(".")[0] in ("trainer", "optimizer", "lr_scheduler") for action in group._group_actions
    )


def _common(parser: argparse.ArgumentParser, command: str) -> str:
    known = {action.dest for action in parser._actions}
    skip = {"fit": ("model.ttt.mode",)}.get(
        command,
        (
            "overwrite",
            "model.budget_seconds",
            "trainer.max_steps",
            "trainer.accumulate_grad_batches",
            "model.compile",
            "export.quantization.scheme",
        ),
    )
    ckpt_path = CKPT_PATH[command][0].lower() + CKPT_PATH[command][1:]
    lines = [
        f"  --{dest:<34}{text or ckpt_path}" for dest, text in COMMON.items() if dest in known and dest not in skip
    ]
    return "most used:\n" + "\n".join(lines) + "\n"
