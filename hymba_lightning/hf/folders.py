"""What lies in a folder beside the weights, and what from_pretrained is asked: checked before transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256
from hymba_lightning.interop.official import is_official
from hymba_lightning.interop.pretrained import (
    ARTIFACT,
    INDEX,
    WEIGHTS,
    check_token_ids,
    read_config,
    read_json,
)
from hymba_lightning.interop.weight_files import PretrainedError, check_pointer

GENERATION_CONFIG = "generation_config.json"
# Values of device_map that spread a model over what there is.
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
ELSEWHERE = {"disk", "meta"}


def is_read_by_us(folder: Path) -> bool:
    """Whether the folder has our artifact and no safetensors file, or is a released Hymba's."""
    if is_official(folder):
        return True
    stored = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    return not stored and (folder / ARTIFACT).is_file() and bool(read_config(folder))


def check_beside(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises PretrainedError where the tokenizer in a folder of ours is not the network's, or its settings for
    generation are damaged."""
    settings, tokenizer = folder / GENERATION_CONFIG, folder / TOKENIZER_FILE
    if settings.is_file():
        check_token_ids(settings, read_json(settings), config["net"]["vocab_size"])
    wanted = config.get("tokenizer_sha256")
    if isinstance(wanted, str) and tokenizer.is_file():
        check_pointer(tokenizer)
        found = file_sha256(tokenizer)
        if found != wanted:
            raise PretrainedError(
                f"{tokenizer} is another tokenizer (sha256 {found}) than the network's ({wanted}): put that one there"
            )


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained, for a network that is computed on one device.

    Raises ValueError for a device_map over several devices or on disk.
    """
    device_map = options.get("device_map")
    if device_map in SPREADING:
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
    if len(places) > 1 or places & ELSEWHERE:
        raise ValueError(
            f"device_map puts the network on {', '.join(sorted(places))}, and it is computed on one device: give "
            "device_map={'': 'cuda:0'}, or 'auto'"
        )
    return options
