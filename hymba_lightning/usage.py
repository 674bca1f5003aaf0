"""What a user is told about the command line itself: the commands, near misses, versions, and what to do next."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_lightning import __version__
from hymba_lightning.errors import UsageError
from hymba_lightning.signals import Saved

COMMANDS = {
    "prepare": "text → tokenizer and token shards",
    "fit": "train inside the budget, export the artifact, score every stage",
    "validate": "score a checkpoint or an artifact",
    "test": "score-first test-time training on a checkpoint or an artifact",
    "export": "a checkpoint → an artifact, by any scheme and limit",
    "inspect": "what an artifact holds and where its bytes are",
    "sample": "let a checkpoint or an artifact continue a text",
    "bpb": "bits per byte of each document of any files",
    "report": "one HTML page on one or more runs",
    "package": "the challenge's folder for a run, scored there as a referee would",
    "publish": "a run's network for Hugging Face's libraries, and onto the hub",
    "probe": "what is the context worth? loss, copying and recall by distance, without this or that",
    "study": "compare runs (ablations, seeds, contexts, …) or time a part; `hymba study` lists what there is",
    "audit": "do the rules of the score hold? an artifact, or a folder of package",
    "import-reference": "take over the public reference run's checkpoint or quantized file",
}
# What other tools call it.
OTHER_NAMES = {
    "train": "fit",
    "pretrain": "fit",
    "run": "fit",
    "resume": "fit",
    "eval": "validate",
    "evaluate": "validate",
    "score": "test",
    "ttt": "test",
    "generate": "sample",
    "complete": "sample",
    "quantize": "export",
    "tokenize": "prepare",
    "preprocess": "prepare",
    "info": "inspect",
    "show": "inspect",
    "plot": "report",
    "submit": "package",
    "upload": "publish",
    "push": "publish",
    "submission": "package",
}
HELP, VERSION = ("help", "-h", "--help"), ("version", "-V", "--version")
# What other tools call an option, by its last part.
OTHER_OPTIONS = {
    "lr": "matrix_lr",
    "wd": "weight_decay",
    "bs": "micro_batch_size",
    "batch": "micro_batch_size",
    "batch_size": "micro_batch_size",
    "gpu": "devices",
    "gpus": "devices",
    "n_gpus": "devices",
    "num_gpus": "devices",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "steps": "max_steps",
    "iters": "max_steps",
    "max_iters": "max_steps",
    "max_seconds": "budget_seconds",
    "seconds": "budget_seconds",
    "time": "budget_seconds",
    "context": "seq_len",
    "context_length": "seq_len",
    "block_size": "seq_len",
    "resume": "ckpt_path",
    "checkpoint": "ckpt_path",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "length": "max_new_tokens",
}
# Of the options that may be meant, as many are named: by their words, or because they look alike.
MOST_NAMED, MOST_ALIKE = 12, 3
# Behind all places among the near misses.
NOT_NAMED = 6
# Whole numbers by which launchers tell a process which of several it is.
LAUNCHERS = ["RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"]
LAUNCHERS += ["SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"]
_QAT = "late quantization-aware training made artifacts no better at 4 or 6 bits; leave it out"
# Options of earlier versions: the value that did nothing, with which the config of an old run is still taken, and why
# they are gone.
REMOVED: dict[str, tuple[Any, str]] = {
    "model.qat_start": (1.0, _QAT),
    "model.runtime.qat_bits": (0, _QAT),
    "model.ttt.compile": (False, "compiling took longer than any stream gains by it; leave it out"),
}
MISSING = {
    "fit": "nothing says what to train on and what ends the run: give --config with a file, such as "
    "demo.yaml, which comes with the package, or --data.data_dir and one of --model.budget_seconds and "
    "--trainer.max_steps",
    "validate": "nothing to score: give --ckpt_path with an artifact or a checkpoint, and the --config of its run",
    "test": "nothing to score: give --ckpt_path with an artifact or a checkpoint, and the --config of its run",
}


def overview() -> str:
    """What `hymba` and `hymba --help` print."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}} {text}" for name, text in COMMANDS.items())
    return f"""usage: hymba <command> [options]

Train a Hymba language model against the clock, export it, score it.

commands:
{lines}

`hymba <command> --help` explains every option; `--debug` shows the traceback of an error; `hymba --version`.
"""


def versions() -> str:
    """Versions of this package and of the libraries that a result depends on, read without importing them."""

    def version(name: str) -> str:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed"

    return f"hymba {__version__}\n{', '.join(map(version, ('torch', 'lightning', 'jsonargparse', 'numpy')))}"


def as_meant(args: Sequence[str]) -> list[str]:
    """The arguments of `hymba`, where help and versions are asked for in another's words in ours.

    >>> as_meant(["help", "fit"]), as_meant(["fit", "--version"]), as_meant([])
    (['fit', '--help'], ['--version'], ['--help'])
    """
    args = list(args) or ["--help"]
    if args[0] in VERSION or (len(args) == 2 and args[0] in COMMANDS and args[1] in VERSION[1:]):
        return ["--version"]
    if args[0] in HELP:
        return [*args[1:], "--help"] if args[1:] and args[1] not in HELP else ["--help"]
    # What these take are options only.
    if len(args) == 2 and args[0] in MISSING and args[1] == "help":
        return [args[0], "--help"]
    return args


def check_environment(command: str) -> None:
    """
    Raises:
        UsageError: what a launcher sets is no number.
    """
    for name in LAUNCHERS:
        value = os.environ.get(name, "")
        # -1 says to some programs that there are no ranks: what has none takes it.
        digits = value if command in ("fit", "validate", "test") else value.removeprefix("-")
        if value and not digits.isdecimal():
            raise UsageError(
                f"{name} is {value!r} in the environment, and has to be a whole number: set it, or unset it"
            )


def check_command(name: str, args: Sequence[str]) -> None:
    """
    Raises:
        UsageError: no such command, or one of ours that can do nothing without options.
    """
    check_name("command", name, COMMANDS, OTHER_NAMES)
    if not args and name in MISSING:
        raise UsageError(MISSING[name])


def check_name(kind: str, name: str, known: Iterable[str], other_names: Mapping[str, str]) -> None:
    """
    Raises:
        UsageError: `name` is not among those `known`; it tells the one meant, by `other_names` or by its letters.
    """
    known = list(known)
    if name.startswith("--") and (near := difflib.get_close_matches(name, ("--help", "--version", "--debug"), 1)):
        raise UsageError(f"unknown option {name} (did you mean {near[0]}?)")
    if name not in known:
        what = f"{name} comes before a {kind}" if name.startswith("-") else f"there is no {kind} {name!r}"
        near = [other_names[name]] if name in other_names else difflib.get_close_matches(name, known, 1)
        near += [other for other in known if not near and other in name]
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{what}{hint}: choose from {', '.join(known)}")


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """Known names that `name` may stand for, likely ones first: what other tools call so, those with the same last
    part, with it as one of their words, with a word that it abbreviates; else the most alike. Where it names a group,
    those in it alone, if there are any.

    >>> near_misses("--lr", ["--ttt.lr", "--ttt.lr_decay", "--ttt.rest_lr", "--optimizer.matrix_lr", "--run_dir"])
    ['--optimizer.matrix_lr', '--ttt.lr', '--ttt.rest_lr', '--ttt.lr_decay']
    """
    name = name.lstrip("-").replace("-", "_").replace("learning_rate", "lr")
    ours = {option.lstrip("-"): option for option in known}
    group, _, last = name.rpartition(".")
    place = {key: _place(last, key.rpartition(".")[2]) for key in ours}
    near = sorted((key for key in ours if place[key] < NOT_NAMED), key=place.__getitem__)
    if group:
        near = [key for key in near if f".{group}." in f".{key}"] or near
    if not near:
        alike = {key: max(_alike(name, key), _alike(last, key.rpartition(".")[2])) for key in ours}
        best = max(alike.values(), default=0.0)
        near = [key for key in ours if alike[key] >= max(0.75, best - 0.02)]
        near = sorted(near, key=lambda key: -alike[key])[:MOST_ALIKE]
    return [ours[key] for key in near]


def did_you_mean(name: str, known: Iterable[str], kind: str = "option") -> str:
    """The near misses as a question in brackets, '' where there are none.

    Args:
        name: What was given.
        known: What it may stand for.
        kind: What is written with dashes is an "option", and without them else.
    """
    near = [option if kind == "option" else option.lstrip("-") for option in near_misses(name, known)]
    more = len(near) - MOST_NAMED
    if more > 0:
        near[MOST_NAMED:] = [f"{more} more"]
    *most, last = near or [""]
    return f" (did you mean {', '.join(most)} or {last}?)" if most else f" (did you mean {last}?)" if last else ""


def _place(given: str, ours: str) -> int:
    """How far down among the near misses an option belongs, by its last part and the given one's."""
    ways = (
        OTHER_OPTIONS.get(given) == ours,
        ours == given,
        ours.endswith(f"_{given}"),
        ours.startswith(f"{given}_"),
        f"_{given}_" in ours,
        len(given) > 2 and f"_{given}" in f"_{ours}",
    )
    return ways.index(True) if True in ways else NOT_NAMED


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def unknown(kind: str, name: str, known: Iterable[str], command: str) -> UsageError:
    """The error for an option or a key of a config that does not exist, or no longer."""
    if name.lstrip("-") in REMOVED:
        return UsageError(f"{kind} {name} was removed: {REMOVED[name.lstrip('-')][1]}")
    hint = did_you_mean(name, known, kind) if kind != "argument" else ""
    return UsageError(f"unknown {kind} {name}{hint}; `{command} --help` lists them all")


def without_removed(value: Any) -> Any:
    """A config's values without removed options that did nothing; every run once wrote them into its config.yaml."""
    for name, (idle, _) in REMOVED.items():
        *groups, last = name.split(".")
        inner = value
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and last in inner and inner[last] == idle:
            del inner[last]
    return value


def without_options(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """`args` without these options and their values."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip and not arg.startswith("--"):
            skip = False
            continue
        skip = arg in names
        if not skip and arg.partition("=")[0] not in names:
            kept.append(arg)
    return kept


def resume_command(args: Sequence[str], saved: Saved) -> str:
    """The command that goes on from a checkpoint.

    Args:
        args: The arguments of the run that wrote it, "fit" first.
        saved: The checkpoint.
    """
    own = without_options(args, ("--ckpt_path", "--overwrite"))
    if saved.path.name == "last.ckpt" and saved.path.parent.name == "checkpoints":
        run = ["--run_dir", str(saved.path.parent.parent), "--ckpt_path", "last"]
        own = without_options(own, ("--run_dir",))
    else:
        run = ["--ckpt_path", str(saved.path)]
    return f"hymba {shlex.join([*own, *run])}"


# Those of runs; the others measure, and keep nothing of what is half done.
STUDIES_THAT_GO_ON = ("ablation", "context", "quantization", "reference", "seeds", "ttt")


def after_stop(args: Sequence[str], signal_name: str, saved: Saved | None) -> str:
    """The message of a command that a signal ended."""
    if args[0] == "study" and args[1:2] and args[1] in STUDIES_THAT_GO_ON:
        return (
            f"stopped by {signal_name}; runs that ended, and what the others have saved, are kept. To go on with them: "
            f"hymba {shlex.join(args)}"
        )
    if args[0] != "fit":
        return f"stopped by {signal_name} before it was done; to do it again: hymba {shlex.join(args)}"
    if saved is None and any(arg.partition("=")[0] == "--ckpt_path" for arg in args):
        again = shlex.join(without_options(args, ("--overwrite",)))
        return (
            f"stopped by {signal_name} before it made a step; the checkpoint that it was to go on from is as it was. "
            f"To go on: hymba {again}"
        )
    if saved is None:
        return f"stopped by {signal_name} before anything was saved; to start again: hymba {shlex.join(args)}"
    return f"stopped by {signal_name}; {saved.path} holds step {saved.step}. To go on: {resume_command(args, saved)}"


def after_fit(run_dir: Path, artifact: Path | None) -> str:
    """What a finished run is good for, as commands. `artifact`: None where there is only the checkpoint, or nothing."""
    run = shlex.quote(str(run_dir))
    file = artifact or run_dir / "checkpoints" / "last.ckpt"
    if not file.is_file():
        return f"next: hymba report {run}"
    weights = shlex.quote(str(file))
    config = shlex.quote(str(run_dir / "config.yaml"))
    return (
        f"next: hymba test --config {config} --run_dir {run} --ckpt_path {weights}\n"
        f'      hymba sample {weights} "Once"\n'
        f"      hymba report {run}"
    )
