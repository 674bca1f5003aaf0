"""A network and its tokenizer from an artifact or a Lightning checkpoint, without running anything a file brings."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from hymba_lightning.checkpoints import TOKENIZER_KEY, read_checkpoint
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import is_artifact, load_artifact

PREFIX = "net."


def load_network(path: str | Path, runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008 - frozen
                 device: str | torch.device = "cpu") -> tuple[Hymba, str | None]:
    """The network, ready to run, and the SHA-256 of the tokenizer it was made for (None where the file has none).

    Of a checkpoint the averaged weights are taken, as in validation and export. Raises FileNotFoundError, or ValueError
    naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path {path} does not exist")
    fingerprint = None
    if is_artifact(path):
        artifact = load_artifact(path)
        config, weights, fingerprint = artifact.config, artifact.state_dict, artifact.tokenizer.get("sha256")
    else:
        checkpoint = read_checkpoint(path)
        if "net" not in checkpoint.get("hyper_parameters", {}):
            raise ValueError(f"{path} does not say which network it holds: give a checkpoint of `hymba fit`")
        config, fingerprint = checkpoint["hyper_parameters"]["net"], checkpoint.get(TOKENIZER_KEY)
        weights = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()
                   if name.startswith(PREFIX)}
    net = Hymba(HymbaConfig.from_dict(config), runtime)
    net.load_state_dict(weights)
    return net.to(device).eval(), fingerprint


def find_tokenizer(weights: Path, given: str | None, fingerprint: str | None) -> Path:
    """The SentencePiece model for `weights`: the given one, else the one that the run's config.yaml names.

    Raises FileNotFoundError where none is found, ValueError where it is not the one that the weights were made for.
    """
    path = Path(given).expanduser() if given else _tokenizer_of_run(weights)
    if path is None or not path.is_file():
        found = "no config.yaml of a run lies beside the weights" if path is None else f"{path} does not exist"
        raise FileNotFoundError(f"which tokenizer? {found}: give --tokenizer MODEL")
    if fingerprint is not None and file_sha256(path) != fingerprint:
        raise ValueError(f"{weights} was made for another tokenizer (sha256 {fingerprint}) than {path}: give "
                         "--tokenizer the right one")
    return path


def _tokenizer_of_run(weights: Path) -> Path | None:
    for folder in (weights.parent, weights.parent.parent):
        config = folder / "config.yaml"
        if config.is_file():
            data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
            return Path(data["tokenizer"] or Path(data["data_dir"]) / TOKENIZER_FILE).expanduser()
    return None
