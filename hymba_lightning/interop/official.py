"""The released Hymba models (nvidia/Hymba-1.5B-Base and -Instruct) as our networks, and back.

Their config.json and the names in their safetensors files are facts of those files; the functions here rename, and
nothing is transposed or joined. M meta tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.interop.official_config import MODEL_TYPE, config_from_hf, config_to_hf, preset, some_of
from hymba_lightning.interop.pretrained import (
    CONFIG,
    WEIGHTS,
    Pretrained,
    PretrainedError,
    check_names,
    find_folder,
    folder_config,
    need,
    read_json,
    read_weights,
)
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.roles import Role, roles_of

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "is_official",
    "load",
    "name_in_hf",
    "preset",
    "to_hf",
    "weights_from_hf",
    "weights_to_hf",
    "with_bfloat16_matrices",
]

NAMES = {
    "tok_emb.weight": "model.embed_tokens.weight",
    "meta_tokens": "model.memory_tokens",
    "norm.weight": "model.final_layernorm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Of a layer, ours → theirs.
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "pre_moe_layernorm.weight",
    "mlp.gate.weight": "moe.experts.0.gate_proj.weight",
    "mlp.up.weight": "moe.experts.0.up_proj.weight",
    "mlp.down.weight": "moe.experts.0.down_proj.weight",
    "attn.in_proj.weight": "mamba.in_proj.weight",
    "attn.out_proj.weight": "mamba.out_proj.weight",
    "attn.conv1d.weight": "mamba.conv1d.weight",
    "attn.conv1d.bias": "mamba.conv1d.bias",
    "attn.x_proj.weight": "mamba.x_proj.0.weight",
    "attn.dt_proj.weight": "mamba.dt_proj.0.weight",
    "attn.dt_proj.bias": "mamba.dt_proj.0.bias",
    "attn.A_log": "mamba.A_log.0",
    "attn.D": "mamba.D.0",
    "attn.dt_norm.weight": "mamba.dt_layernorm.weight",
    "attn.B_norm.weight": "mamba.B_layernorm.weight",
    "attn.C_norm.weight": "mamba.C_layernorm.weight",
    "attn.attention_norm.weight": "mamba.pre_avg_layernorm1.weight",
    "attn.scan_norm.weight": "mamba.pre_avg_layernorm2.weight",
}


def name_in_hf(name: str) -> str:
    """The released model's name of one of our tensors. Raises KeyError for one that it does not have."""
    if name in NAMES:
        return NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def weights_from_hf(config: HymbaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, in the dtype that they have.

    Raises ValueError naming tensors that are missing, not the network's, or of another shape than the config says.
    """
    own = {name: value.shape for name, value in outline(config).state_dict().items()}
    theirs = {name_in_hf(name): name for name in own}
    rest = set(tensors) - set(theirs)
    if config.tie_embeddings and "lm_head.weight" in rest:
        # Some writers keep both names of one matrix.
        if not torch.equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight", torch.empty(0))):
            raise ValueError(
                "its lm_head.weight is not model.embed_tokens.weight, which tie_word_embeddings says it is: set "
                "tie_word_embeddings to false in config.json"
            )
        rest.remove("lm_head.weight")
    for names, what in ((set(theirs) - set(tensors), "lacks"), (rest, "has, beyond the network's,")):
        if names:
            raise ValueError(
                f"it {what} {some_of(names)}: give the config.json that belongs to these weights, or fetch both again"
            )
    weights = {}
    for name, ours in theirs.items():
        value = tensors[name][None] if ours == "meta_tokens" else tensors[name]
        if value.shape != own[ours]:
            wanted = own[ours][1:] if ours == "meta_tokens" else own[ours]
            raise ValueError(
                f"its {name} has the shape {list(tensors[name].shape)}, where config.json asks for {list(wanted)}: "
                "give the config.json that belongs to these weights, or fetch both again"
            )
        weights[ours] = value
    return weights


def weights_to_hf(net: Hymba) -> dict[str, Tensor]:
    """The weights under their names, as they are stored; on the CPU. Raises ValueError where one is made of others."""
    check_names(net.config, net.state_dict())
    values = {name_in_hf(name): value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    if "model.memory_tokens" in values:
        values["model.memory_tokens"] = values["model.memory_tokens"][0]
    return values


def load(folder: Path, content: dict[str, Any]) -> Pretrained:
    """Loads a folder of a released Hymba model as `load_pretrained` does one of ours; `content` is its config.json.

    Raises FileNotFoundError or PretrainedError naming the file and what is wrong with it.
    """
    try:
        config = config_from_hf(content)
    except ValueError as error:
        raise PretrainedError(f"{folder / CONFIG}: {error}") from error
    tensors = read_weights(folder)
    try:
        weights = weights_from_hf(config, tensors)
    except ValueError as error:
        raise PretrainedError(f"{folder}: {error}") from error
    return Pretrained(config.to_dict(), weights, None, own_content(config, content))


def own_content(config: HymbaConfig, content: dict[str, Any]) -> dict[str, Any]:
    """The config.json of our format for a network, made from that of the released model."""
    ends = {name: content[name] for name in ("eos_token_id", "pad_token_id") if type(content.get(name)) is int}
    return folder_config(config, None, None) | ends


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a released model, or one in their layout."""
    path = Path(folder) / CONFIG
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def from_hf(
    name: str | Path,
    runtime: RuntimeConfig | None = None,
    device: str | torch.device = "cpu",
    *,
    matrices: str = "float32",
    vocab_size: int | None = None,
    **hub: Any,
) -> Hymba:
    """The network of a released model, or of a folder in its layout, ready to run.

    Args:
        name: The folder, or owner/name on the hub (hf:owner/name too), e.g. nvidia/Hymba-1.5B-Base.
        runtime: How it is executed.
        device: Where it is put.
        matrices: Storage of the matrices and the token table: float32 to train; bfloat16, in which the released models
            are stored, takes half the memory and, where the runtime computes in bfloat16, no casts.
        vocab_size: Keep so many rows of the token table and head, the first ones: the released models have one more
            than their tokenizer has pieces, and `hymba fit` wants as many.
        hub: Handed to huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only, …

    Raises:
        FileNotFoundError: there is no such folder, no such repository, or a file of it is missing.
        ValueError: a file is damaged, or asks for what the released models do not do; `matrices` is unknown, or
            `vocab_size` is more than there is.
    """
    if matrices not in ("float32", "bfloat16"):
        raise ValueError(f"matrices={matrices!r} is unknown: choose float32 or bfloat16")
    folder = find_folder(str(name).removeprefix("hf:"), **hub)
    content = read_json(folder / CONFIG)
    if content.get("model_type") != MODEL_TYPE:
        raise PretrainedError(
            f"{folder / CONFIG} is of model_type {content.get('model_type')!r}, not {MODEL_TYPE!r}: "
            "Hymba.from_pretrained reads our own folders"
        )
    found = load(folder, content)
    config, weights = HymbaConfig.from_dict(found.config), found.weights
    if vocab_size is not None:
        if not config.bos_id < vocab_size <= config.vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size} is not between bos_id and the {config.vocab_size} rows there are"
            )
        config = dataclasses.replace(config, vocab_size=vocab_size)
        tables = {name: weights[name][:vocab_size] for name in ("tok_emb.weight", "lm_head.weight") if name in weights}
        weights = weights | tables
    net = Hymba(config, runtime)
    if matrices == "bfloat16":
        with_bfloat16_matrices(net)
    net.load_state_dict(weights)
    return net.to(device).eval()


def with_bfloat16_matrices(net: Hymba) -> Hymba:
    """The network itself, its matrices and tables stored in bfloat16; what needs its digits stays float32."""
    roles = roles_of(net)
    for name, parameter in net.named_parameters():
        if roles[name] in (Role.EMBEDDING, Role.HEAD, Role.MATRIX, Role.TABLE):
            parameter.data = parameter.data.to(torch.bfloat16)
    return net


def to_hf(net: Hymba, folder: str | Path) -> Path:
    """Writes config.json and model.safetensors in the released models' layout, and returns the folder.

    Raises ValueError for a network that is none of that family, ImportError without safetensors.
    """
    config, writer = config_to_hf(net.config), need("safetensors.torch")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, writer.save(weights_to_hf(net), {"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder
