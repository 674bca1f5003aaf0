"""The files of a folder that `transformers` knows, read with care: what is damaged is named with the remedy."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.checkpoints import weights_sha256

CONFIG, WEIGHTS, ARTIFACT, CARD = "config.json", "model.safetensors", "artifact.hymba", "README.md"
# Of weights that transformers wrote in several files.
INDEX = "model.safetensors.index.json"
# Names of weights in model.safetensors are those of our checkpoints and of the transformers class.
PREFIX = "net."
DIGEST = "weights_sha256"
INSTALL = "pip install 'hymba-lightning[hf]'"
AGAIN = "Fetch or save it again"
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LFS = b"version https://git-lfs"
# By which a run's folder is known.
RUN_CONFIG = "config.yaml"


class PretrainedError(ValueError):
    """A folder, or what a name of the hub stands for, holds no network that can be loaded; says what is wrong."""


def need(package: str) -> Any:
    """The optional package. Raises ImportError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs {package.partition('.')[0]}: {INSTALL}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file. Raises FileNotFoundError or PretrainedError."""
    if not path.is_file():
        what = "give a folder that save_pretrained wrote"
        if (path.parent / RUN_CONFIG).is_file():
            what = f"the folder is a run's, and `hymba publish {path.parent} --out FOLDER` makes one of it"
        raise FileNotFoundError(f"there is no {path}: {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}. {AGAIN}") from error
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} holds no JSON object. {AGAIN}")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of the folder's safetensors file, or of the several that an index names.

    Raises FileNotFoundError where one is missing, PretrainedError as `read_safetensors` does.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: fetch the repository's safetensors files"
        )
    index = read_json(folder / INDEX).get("weight_map")
    names = list(index.values()) if isinstance(index, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PretrainedError(f"{folder / INDEX} has no weight_map of tensors to files beside it. {AGAIN}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names)):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {INDEX} names: fetch it")
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by our names, as they are stored. Raises PretrainedError for a damaged file, or one that holds other
    things."""
    library = need("safetensors")
    check_pointer(path)
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (library.SafetensorError, OSError, ValueError, TypeError) as error:
        raise PretrainedError(f"{path} is damaged: {error}. {AGAIN}") from error
    tensors = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    twice = next((name for name in tensors if {name, PREFIX + name} <= stored.keys()), None)
    if twice is not None:
        raise PretrainedError(f"{path} has two tensors for one weight, {twice} and {PREFIX}{twice}. {AGAIN}")
    # What other libraries save has no digest.
    if DIGEST in metadata and metadata[DIGEST] != weights_sha256(tensors):
        raise PretrainedError(f"{path} is damaged: its weights do not match their digest. {AGAIN}")
    wrong = next((name for name, value in tensors.items() if value.dtype not in STORED), None)
    if wrong is not None:
        raise PretrainedError(
            f"{path}: its tensor {wrong} is no weight of a network ({tensors[wrong].dtype}): save it in float32 or "
            "bfloat16"
        )
    infinite = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if infinite is not None:
        raise PretrainedError(f"{path}: its tensor {infinite} holds values that are not finite. {AGAIN}")
    return tensors


def check_pointer(path: Path) -> None:
    """Raises PretrainedError for what git leaves in the place of a large file."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise PretrainedError(f"{path} is Git LFS's pointer to a file, not the file: `git lfs pull` fetches it")
