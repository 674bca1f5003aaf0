"""A network and its tokenizer from an artifact, a checkpoint or a folder of `save_pretrained`; nothing there is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from hymba_lightning.checkpoints import ANOTHER, TOKENIZER_KEY, CheckpointError, check_tokenizer, read_checkpoint
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256
from hymba_lightning.files import not_a_file
from hymba_lightning.interop.pretrained import find_folder, is_folder, load_pretrained
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import is_artifact, load_artifact
from hymba_lightning.quantization.artifact import MAX_MESSAGE, check_shapes
from hymba_lightning.text import printable
from hymba_lightning.yaml_text import load_yaml

# What reading a config that is none ends in.
DAMAGED = (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError)
PREFIX = "net."
HUB = "hf:"


def load_network(
    path: str | Path,
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008 - frozen
    device: str | torch.device = "cpu",
    *,
    allow_undigested: bool = False,
) -> tuple[Hymba, str | None]:
    """The network, ready to run, and the SHA-256 of the tokenizer it was made for (None where the file has none).

    `path` is an artifact, a checkpoint, a folder that `save_pretrained` wrote, or hf:owner/name for a repository of the
    hub. Of a checkpoint the averaged weights are taken, as in validation and export; one without a digest, which
    something else than `hymba fit` wrote, needs `allow_undigested`. Raises FileNotFoundError, or ValueError naming the
    file and what is wrong with it.
    """
    path = local_path(path)
    fingerprint = None
    if path.is_dir():
        if not is_folder(path):
            raise not_a_file(str(path), path, "an artifact, a checkpoint or a folder of save_pretrained")
        found = load_pretrained(path)
        config, weights, fingerprint = found.config, found.weights, found.tokenizer_sha256
    elif is_artifact(path):
        artifact = load_artifact(path)
        config, weights, fingerprint = artifact.config, artifact.state_dict, artifact.tokenizer.get("sha256")
    else:
        config, weights, fingerprint = _of_checkpoint(path, read_checkpoint(path, allow_undigested=allow_undigested))
    net = Hymba(HymbaConfig.from_dict(config), runtime)
    net.load_state_dict(weights)
    return net.to(device).eval(), fingerprint


def local_path(name: str | Path) -> Path:
    """The file or folder; of a repository, that in the cache of huggingface_hub. Raises FileNotFoundError."""
    if str(name).startswith(HUB):
        return find_folder(str(name).removeprefix(HUB))
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist: give an artifact, a checkpoint or a folder of save_pretrained")
    return path


def _of_checkpoint(path: Path, checkpoint: dict[str, Any]) -> tuple[dict, dict[str, torch.Tensor], str | None]:
    """Config, weights and tokenizer fingerprint. Raises CheckpointError for weights that are not the config's."""
    parameters, weights = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
    if (
        not isinstance(parameters, dict)
        or not isinstance(parameters.get("net"), dict)
        or not isinstance(weights, dict)
        or not all(isinstance(name, str) for name in weights)
    ):
        raise CheckpointError(f"{path} does not say which network it holds: give a checkpoint of `hymba fit`")
    weights = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    if not all(
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for value in weights.values()
    ):
        raise CheckpointError(f"{path} is damaged: its weights are no plain tensors. {ANOTHER}")
    try:
        check_shapes(parameters["net"], {name: list(value.shape) for name, value in weights.items()})
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be loaded: {printable(str(error), MAX_MESSAGE)}. {ANOTHER}") from error
    fingerprint = checkpoint.get(TOKENIZER_KEY)
    return parameters["net"], weights, fingerprint if isinstance(fingerprint, str) else None


def find_tokenizer(weights: str | Path, given: str | None, fingerprint: str | None) -> Path:
    """The SentencePiece model for `weights`: the given one, else the one beside, or that the run's config.yaml names.

    Raises FileNotFoundError where none is found, ValueError where it is not the one that the weights were made for.
    """
    path = Path(given).expanduser() if given else _tokenizer_beside(weights)
    if path is None or not path.is_file():
        found = (
            "no config.yaml of a run lies beside the weights"
            if path is None
            else not_a_file(str(path), path, "a SentencePiece model")
        )
        raise FileNotFoundError(f"which tokenizer? {found}: give --tokenizer MODEL")
    if fingerprint is not None:
        check_tokenizer(weights, fingerprint, file_sha256(path), path, "--tokenizer")
    return path


def _tokenizer_beside(weights: str | Path) -> Path | None:
    weights = local_path(weights) if str(weights).startswith(HUB) else Path(weights).expanduser()
    if is_folder(weights.parent) or weights.is_dir():
        return (weights if weights.is_dir() else weights.parent) / TOKENIZER_FILE
    config = _config_beside(weights)
    if config is None:
        return None
    try:
        data = load_yaml(config.read_text(encoding="utf-8"))["data"]
        return Path(data["tokenizer"] or Path(data["data_dir"]) / TOKENIZER_FILE).expanduser()
    except DAMAGED as error:
        why = getattr(error, "problem", type(error).__name__)
        raise ValueError(f"{config}, which would name the tokenizer, is damaged ({why}): give --tokenizer") from error


def started_from(weights: str | Path, unknown: str | None = None) -> str | None:
    """The --start_from of the run whose checkpoint this is, by the config.yaml beside it; `unknown` where none can be
    read."""
    config = _config_beside(Path(weights).expanduser())
    try:
        content = load_yaml(config.read_text(encoding="utf-8")) if config else None
    except DAMAGED:
        content = None
    if not isinstance(content, dict):
        return unknown
    found = content.get("start_from")
    return found if isinstance(found, str) else None


def began_elsewhere(weights: str | Path, start: str) -> bool:
    """Whether the run whose checkpoint this is did not start from `start`, under any spelling, as far as is known."""
    found = started_from(weights, unknown=start)
    if found is None:
        return True
    if found.startswith("hf:") or start.startswith("hf:"):
        return found != start
    begun, given = Path(found).expanduser(), Path(start).expanduser()
    if begun.exists() and given.exists():
        return not begun.samefile(given)
    # Of another working folder, or gone: its name is what is known.
    return begun.name != given.name


def trained_seq_len(weights: str | Path) -> int | None:
    """Tokens of the sequences that a run trained on, by the config.yaml beside its weights; None without one."""
    config = _config_beside(Path(weights).expanduser())
    try:
        found = config and load_yaml(config.read_text(encoding="utf-8"))["data"]["seq_len"]
    except DAMAGED:
        return None
    return found if type(found) is int and found > 0 else None


def _config_beside(weights: Path) -> Path | None:
    """The config.yaml of the run whose artifact or checkpoint this is."""
    configs = (folder / "config.yaml" for folder in (weights.parent, weights.parent.parent))
    return next((config for config in configs if config.is_file()), None)
