"""A network as a folder that `transformers` and the Hugging Face hub know: config.json and model.safetensors.

Our artifact may lie there in place of the safetensors file, or beside it. Only safetensors is needed for it (and
huggingface_hub for names of the hub): both come with `pip install hymba-lightning[hf]`, and are imported where they are
used.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hymba_lightning
from hymba_lightning.checkpoints import weights_sha256
from hymba_lightning.claim import LOCK, OWNER
from hymba_lightning.data.tokenizer import TOKENIZER_FILE, file_sha256
from hymba_lightning.files import write_atomic
from hymba_lightning.interop.tokenizer import load_for_transformers, write_tokenizer
from hymba_lightning.interop.weight_files import (
    AGAIN,
    ARTIFACT,
    CARD,
    CONFIG,
    DIGEST,
    INDEX,
    PREFIX,
    WEIGHTS,
    PretrainedError,
    check_pointer,
    need,
    read_json,
    read_weights,
)
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.config import LATER
from hymba_lightning.model.hymba import outline
from hymba_lightning.quantization import ArtifactError, QuantizationConfig, is_artifact, load_artifact, save_artifact
from hymba_lightning.quantization.artifact import check_shapes

MODEL_TYPE = "hymba_lightning"
WHICH = ("safetensors", "artifact", "both")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Pretrained(NamedTuple):
    """What a folder holds."""

    config: dict[str, Any]  # of the network, for HymbaConfig.from_dict
    weights: dict[str, Tensor]
    tokenizer_sha256: str | None
    extra: dict[str, Any]  # all of config.json


def official() -> Any:
    """The module for folders of the released Hymba models, which is built on this one."""
    return importlib.import_module("hymba_lightning.interop.official")


def save_pretrained(
    net: Hymba,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    weights: str = "safetensors",
    artifact: str | Path | None = None,
    card: str | None = None,
) -> Path:
    """Writes the network into `folder` and returns it; each file whole or not at all.

    Args:
        net: The network.
        folder: Made where it is missing; files of these names in it are replaced.
        tokenizer: The SentencePiece model or tokenizer.json that the network was trained with, put beside it.
        weights: safetensors (float32), artifact (ours, about 6 bits a weight), or both.
        artifact: An artifact of these weights to take, instead of one that is made here.
        card: Text of README.md.

    Raises:
        ValueError: `weights` is none of these, a weight is not finite or is made of others, the artifact is another
            network's, or the tokenizer has another size or is of a library that transformers does not follow.
        NotADirectoryError: a file stands where the folder would be.
        ImportError: safetensors, or with a tokenizer tokenizers, is not installed.
    """
    if weights not in WHICH:
        raise ValueError(f"weights={weights!r} is unknown: choose from {', '.join(WHICH)}")
    if not str(folder):
        raise ValueError("the folder's name is empty: give one, or . for the present folder")
    folder = Path(folder)
    check_names(net.config, net.state_dict())
    infinite = next((name for name, value in net.state_dict().items() if not torch.isfinite(value).all()), None)
    if infinite is not None:
        raise ValueError(f"the network's {infinite} holds values that are not finite, and could not be loaded again")
    processor = None if tokenizer is None else load_for_transformers(tokenizer)
    if processor is not None and processor.get_piece_size() != net.config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {processor.get_piece_size()} pieces, and the network's vocab_size is "
            f"{net.config.vocab_size}: give the tokenizer that it was trained with"
        )
    if artifact is not None and load_artifact(artifact).config != net.config.to_dict():
        raise ValueError(f"{artifact} is another network's artifact: leave it out, and one is made")
    sha256 = None if tokenizer is None else file_sha256(tokenizer)
    content = None
    if weights != "artifact":
        content = _as_safetensors(net)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} cannot be made, a file stands in its place: give another folder") from error
    if content is not None:
        write_atomic(folder / WEIGHTS, content)
    if weights != "safetensors" and artifact is not None:
        write_atomic(folder / ARTIFACT, Path(artifact).read_bytes())
    elif weights != "safetensors":
        save_artifact(
            folder / ARTIFACT,
            net.state_dict(),
            config=net.config.to_dict(),
            tokenizer={} if sha256 is None else {"sha256": sha256, "vocab_size": net.config.vocab_size},
            metadata={"version": hymba_lightning.__version__},
            scheme=QuantizationConfig(),
        )
    for name, kept in ((WEIGHTS, weights != "artifact"), (ARTIFACT, weights != "safetensors")):
        if not kept:
            # The weights of an earlier save are not these.
            (folder / name).unlink(missing_ok=True)
    if tokenizer is not None and Path(tokenizer).resolve() != (folder / TOKENIZER_FILE).resolve():
        write_atomic(folder / TOKENIZER_FILE, Path(tokenizer).read_bytes())
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    config = folder_config(net.config, processor, sha256)
    write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / "generation_config.json", json.dumps(generation_settings(config), indent=2) + "\n")
    if card is not None:
        write_atomic(folder / CARD, card)
    return folder


def check_names(config: HymbaConfig, names: Iterable[str]) -> None:
    """Raises ValueError where a name is no weight of the network: what was pruned, parametrized or adapted would be
    read as a network that lacks weights."""
    others = sorted(set(names) - outline(config).state_dict().keys())
    if others:
        raise ValueError(
            f"{others[0]} is no weight of the network, but a part of one that is pruned, parametrized or has an "
            "adapter: make it one again by torch.nn.utils.prune.remove, parametrize.remove_parametrizations or peft's "
            "merge_and_unload, and save then"
        )


def folder_config(config: HymbaConfig, processor: Any, tokenizer_sha256: str | None) -> dict[str, Any]:
    """config.json: the network's own config under "net", and the names that other libraries look for."""
    bos, eos, pad = (
        (config.bos_id, None, None)
        if processor is None
        else (token if token >= 0 else None for token in (processor.bos_id(), processor.eos_id(), processor.pad_id()))
    )
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["HymbaForCausalLM"],
        "net": config.to_dict(),
        "tokenizer_sha256": tokenizer_sha256,
        "hymba_lightning_version": hymba_lightning.__version__,
        "dtype": "float32",
        "bos_token_id": bos,
        "eos_token_id": bos if eos is None else eos,
        "pad_token_id": bos if pad is None else pad,
    }


def load_pretrained(
    name: str | Path, *, weights: str | None = None, revision: str | None = None, **hub: Any
) -> Pretrained:
    """What a folder, or a repository of the hub, holds; one of the released Hymba models' too.

    Args:
        name: The folder, or owner/name on the hub.
        weights: safetensors or artifact; by default the safetensors file where there is one.
        revision: Branch, tag or commit on the hub.
        hub: Handed to huggingface_hub's `snapshot_download`: token, cache_dir, local_files_only, …

    Raises:
        FileNotFoundError: there is no such folder, and no such repository.
        PretrainedError: it is no folder of ours, or a file in it is damaged or does not fit.
        ImportError: an optional package is not installed.
    """
    folder = find_folder(name, revision=revision, **hub)
    content = read_json(folder / CONFIG)
    if content.get("model_type") == official().MODEL_TYPE:
        return official().load(folder, content)
    extra = read_config(folder)
    if weights not in (None, "safetensors", "artifact"):
        raise ValueError(f"weights={weights!r} is unknown: choose safetensors or artifact")
    names = {"safetensors": (WEIGHTS, INDEX), "artifact": (ARTIFACT,), None: (WEIGHTS, INDEX, ARTIFACT)}[weights]
    path = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    if path is None:
        there = [name for name in names if name != INDEX]
        raise FileNotFoundError(
            f"{folder} holds no {' and no '.join(there)}: fetch it, or save the network again by save_pretrained"
        )
    if not path.is_file():
        raise PretrainedError(f"{path} is no file, or a link to none. {AGAIN}")
    tensors = _of_artifact(path, extra["net"]) if path.name == ARTIFACT else read_weights(folder)
    tensors = tensors | _shared(HymbaConfig.from_dict(extra["net"]), tensors)
    try:
        check_shapes(extra["net"], {name: list(value.shape) for name, value in tensors.items()})
    except ArtifactError as error:
        raise PretrainedError(
            f"{path} does not fit {CONFIG}: {error}. Fetch both again, or save the network again"
        ) from error
    sha256 = extra.get("tokenizer_sha256")
    return Pretrained(extra["net"], tensors, sha256 if isinstance(sha256, str) else None, extra)


def from_pretrained(
    name: str | Path, runtime: RuntimeConfig | None = None, device: str | torch.device = "cpu", **options: Any
) -> Hymba:
    """The network, ready to run; options and errors are those of `load_pretrained`."""
    found = load_pretrained(name, **options)
    net = Hymba(HymbaConfig.from_dict(found.config), runtime)
    net.load_state_dict(found.weights)
    return net.to(device).eval()


def push_to_hub(folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Makes the repository owner/name where it is missing, uploads the folder's files, and returns the commit's URL.

    Raises ValueError for a name that is none, ConnectionError where the hub refuses or does not answer.
    """
    hub = need("huggingface_hub")
    api = hub.HfApi(token=token)
    message = f"hymba_lightning {hymba_lightning.__version__}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=message, ignore_patterns=[LOCK, OWNER]
        )
        return str(done.commit_url)
    except hub.errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository: give owner/name") from error
    except (hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"the hub does not take {repository} ({reason}): log in with `hf auth login` or set HF_TOKEN, and try again"
        ) from error


def push_network(
    net: Hymba, repository: str, *, private: bool | None = None, token: str | None = None, **save: Any
) -> str:
    """`save_pretrained` into a folder that lasts as long as the upload, then `push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder, **save)
        return push_to_hub(folder, repository, private=private, token=token)


def is_folder(path: str | Path) -> bool:
    """Whether a folder holds a network as `save_pretrained` writes it."""
    return (Path(path) / CONFIG).is_file()


def find_folder(name: str | Path, **hub: Any) -> Path:
    """The folder itself, or a repository's files in huggingface_hub's cache. Raises as `load_pretrained` does."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if Path(name).expanduser().is_file():
        raise FileNotFoundError(
            f"{name} is a file, and a folder or the name owner/name of a repository is needed: artifacts and "
            "checkpoints are read by `hymba_lightning.hf.load` and `hymba_lightning.generation.load_network`"
        )
    if not REPOSITORY.fullmatch(str(name)):
        raise FileNotFoundError(f"{name} is no folder, nor the name owner/name of a repository on the hub")
    library = need("huggingface_hub")
    try:
        return Path(
            library.snapshot_download(str(name), **{key: value for key, value in hub.items() if value is not None})
        )
    except (library.errors.HfHubHTTPError, library.errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} is no folder, and the hub does not give it ({reason})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, of which "net" is a config of ours. Raises FileNotFoundError or PretrainedError."""
    path = folder / CONFIG
    content = read_json(path)
    if content.get("model_type") != MODEL_TYPE:
        kind = content.get("model_type")
        raise PretrainedError(
            f"{path} is that of another kind of model ({kind!r} where {MODEL_TYPE!r} is needed): give a folder that "
            "save_pretrained wrote"
        )
    if not isinstance(content.get("net"), dict):
        raise PretrainedError(f"{path} has no network's config under 'net'. {AGAIN}")
    missing = sorted({field.name for field in dataclasses.fields(HymbaConfig)} - {*content["net"], *LATER})
    if missing:
        raise PretrainedError(f"{path} does not say the network's {', '.join(missing)}. {AGAIN}")
    try:
        network = HymbaConfig.from_dict(content["net"])
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}. {AGAIN}") from error
    check_token_ids(path, content, network.vocab_size)
    return content


def check_token_ids(path: Path, content: dict[str, Any], vocab_size: int) -> None:
    """Raises PretrainedError where a file of settings names a special token that the network has not."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = content.get(name)
        for token in given if isinstance(given, list) and name == "eos_token_id" else [given]:
            if token is not None and not (type(token) is int and 0 <= token < vocab_size):
                raise PretrainedError(
                    f"{path}: {name}={given!r} is no id below the network's vocab_size={vocab_size}. {AGAIN}"
                )


def _as_safetensors(net: Hymba) -> bytes:
    writer = need("safetensors.torch")
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    for name in shared_weights(net.config):
        del tensors[name]
    metadata = {"format": "pt", DIGEST: weights_sha256(tensors)}
    return writer.save({PREFIX + name: value for name, value in tensors.items()}, metadata)


def shared_weights(config: HymbaConfig) -> dict[str, str]:
    """Names of weights that are another's too → the name under which they are stored."""
    every = config.kv_share_every
    return {
        f"blocks.{layer}.attn.kv_proj.weight": f"blocks.{layer - layer % every}.attn.kv_proj.weight"
        for layer in range(config.n_layers)
        if layer % every
    }


def _shared(config: HymbaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[source] for name, source in shared_weights(config).items() if source in tensors}


def _of_artifact(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    check_pointer(path)
    if not is_artifact(path):
        raise PretrainedError(f"{path} is no artifact. {AGAIN}")
    artifact = load_artifact(path)
    if artifact.config != HymbaConfig.from_dict(config).to_dict():
        raise PretrainedError(f"{path} is the artifact of another network than {CONFIG} says. Fetch or save both again")
    return artifact.state_dict


def generation_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings for transformers' `generate`: a text ends at the end of a document, or at the start of another."""
    bos, eos, pad = (config.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    ends = {bos, *(eos if isinstance(eos, list) else [eos])} - {None}
    return {"bos_token_id": bos, "eos_token_id": sorted(ends), "pad_token_id": pad}
