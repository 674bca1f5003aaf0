"""What lies in a folder beside the weights, and what from_pretrained is asked: checked before transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hymba_lightning.data.tokenizer import SPACE, TOKENIZER_FILE, file_sha256
from hymba_lightning.interop.official import is_official
from hymba_lightning.interop.pretrained import (
    ARTIFACT,
    INDEX,
    WEIGHTS,
    check_token_ids,
    read_config,
    read_json,
)
from hymba_lightning.interop.tokenizer import FAST_FILE, TOKENIZER_CONFIG
from hymba_lightning.interop.weight_files import PretrainedError, check_pointer

# What transformers reads for a tokenizer, beside its model.
TOKENIZER_FILES = (TOKENIZER_CONFIG, FAST_FILE, "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
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
    """Raises PretrainedError where the tokenizer in a folder of ours is not the network's, or its settings or those for
    generation are damaged."""
    check_tokenizer_files(folder)
    settings, tokenizer = folder / GENERATION_CONFIG, folder / TOKENIZER_FILE
    if settings.is_file():
        check_token_ids(settings, read_json(settings), config["net"]["vocab_size"])
    wanted = config.get("tokenizer_sha256")
    if isinstance(wanted, str) and tokenizer.is_file():
        check_fingerprint(tokenizer, wanted)


def check_tokenizer(tokenizer: Any, name: str, vocab_size: int, bos: int, asked: bool) -> None:
    """Raises PretrainedError where a tokenizer that transformers made of a folder's files, and of what a call `asked`,
    is not that of a network with so many rows, whose texts begin with `bos`."""
    ids = tokenizer.get_vocab()
    pieces: dict[int, str] = {}
    for piece, token in ids.items():
        pieces.setdefault(token, piece)
    foreign = next((piece for piece, token in ids.items() if token >= vocab_size or pieces[token] != piece), None)
    names, longest, template = tokenizer.model_input_names, tokenizer.model_max_length, tokenizer.chat_template
    if foreign is not None:
        raise _other(name, asked, f"give a token that the network has not, {foreign!r}")
    if max(pieces) != vocab_size - 1:
        raise _other(name, asked, f"make a tokenizer of {max(pieces) + 1} pieces, and the network has {vocab_size}")
    if not isinstance(names, list) or "input_ids" not in names:
        raise _other(name, asked, f"say model_input_names={names!r}, which must be a list with 'input_ids'")
    if not (isinstance(longest, int | float) and longest > 0):
        raise _other(name, asked, f"say model_max_length={longest!r}, which must be a number over 0")
    if not isinstance(template, str | dict | None):
        raise _other(name, asked, f"say chat_template={template!r}, which must be a text")
    if tokenizer.bos_token_id != bos or tokenizer("")["input_ids"] != [bos]:
        raise _other(name, asked, f"do not begin each text with the network's token {bos}")


def check_same_ids(tokenizer: Any, name: str, processor: Any, asked: bool) -> None:
    """Raises PretrainedError where a tokenizer of a tokenizer.json gives other ids, or another text for them, than the
    tokenizer.model beside it, which is `processor`: looked at for a text of all its pieces."""
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    text = " ".join(pieces).replace(SPACE, " ")
    wanted = processor.encode(text)
    found = tokenizer(text, verbose=False)["input_ids"][1:]
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise _other(name, asked, "leave merges out at random (dropout)")
    if found != wanted:
        at = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), len(wanted) - 1)
        raise _other(name, asked, f"give other ids than {TOKENIZER_FILE}, as for {processor.decode(wanted[at:][:8])!r}")
    if tokenizer.decode(found) != processor.decode(wanted):
        raise _other(name, asked, f"give another text for ids than {TOKENIZER_FILE}")


def damaged_tokenizer(name: str, error: Exception) -> PretrainedError:
    """What to raise where transformers could not make a tokenizer. Raises PretrainedError naming the file where one of
    them is no JSON object."""
    check_tokenizer_files(Path(name))
    return _other(name, False, f"make no tokenizer ({error})")


def check_tokenizer_files(folder: Path) -> None:
    """Raises PretrainedError where a file that transformers reads for its tokenizer is no JSON object."""
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            read_json(folder / file)


def check_fingerprint(tokenizer: Path, wanted: str) -> None:
    """Raises PretrainedError where a tokenizer's file is not the one with that SHA-256."""
    check_pointer(tokenizer)
    found = file_sha256(tokenizer)
    if found != wanted:
        raise PretrainedError(
            f"{tokenizer} is another tokenizer (sha256 {found}) than the network's ({wanted}): put that one there"
        )


def _other(name: str, asked: bool, what: str) -> PretrainedError:
    files = [file for file in (*TOKENIZER_FILES, TEMPLATE) if (Path(name) / file).is_file()] or [TOKENIZER_CONFIG]
    if asked:
        files.append("the options of this call")
    return PretrainedError(
        f"{name}: {' and '.join(files)} {what}. Fetch or save the tokenizer again, or leave "
        f"{TOKENIZER_FILE} alone there"
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
