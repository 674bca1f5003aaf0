"""The released Hymba models (nvidia/Hymba-1.5B-Base and -Instruct) as our networks, and back.

Their config.json and the names in their safetensors files are facts of those files; the functions here rename, and
nothing is transposed or joined. M meta tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.files import write_atomic
from hymba_lightning.interop.pretrained import (
    CONFIG,
    WEIGHTS,
    Pretrained,
    PretrainedError,
    find_folder,
    folder_config,
    need,
    read_json,
    read_safetensors,
)
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.model.hymba import outline
from hymba_lightning.model.roles import Role, roles_of
from hymba_lightning.quantization.artifact import MAX_LAYERS

MODEL_TYPE = "hymba"
INDEX = "model.safetensors.index.json"
# Where their modelling code lies, for those who run a folder of `to_hf` by it.
CODE = "nvidia/Hymba-1.5B-Base"
# Their field → ours; every one is needed.
FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_width",
    "mamba_expand": "expand",
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "num_memory_tokens": "meta_tokens",
    "tie_word_embeddings": "tie_embeddings",
    "rope_theta": "rope_base",
    "rms_norm_eps": "norm_eps",
    "bos_token_id": "bos_id",
}
# These need more than another name.
OTHERS = ("sliding_window", "global_attn_idx", "kv_reuse_group", "mamba_dt_rank", "rope_type")
# Options of theirs of which we have the released models' choice alone; a field that is not there has it.
CHOSEN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_hidden_act": ("silu",),
    "mamba_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "mamba_inner_layernorms": (True,),
    "num_experts": (1,),
    "num_mamba": (1,),
    "rope": (True,),
    "kq_norm": ("none", None),
    "kv_weight_reuse": (False,),
    "kv_reuse_every_i_layer": (-1,),
    "memory_tokens_interspersed_every": (0,),
    "attention_dropout": (0.0,),
    "attn_hidden_size": (-1,),
    "kq_head_dim": (-1,),
}
# What is off in all of them.
OFF: dict[str, Any] = {"mixer": "official", "smear_gate": False, "bigram_hash": False, "logit_softcap": 0.0}
STARTING_POINT: dict[str, Any] = {"tied_embed_std": 0.02, "dt_init": "mamba"}
# config.json of nvidia/Hymba-1.5B-Base.
HYMBA_1_5B: dict[str, Any] = {
    "vocab_size": 32001,
    "num_hidden_layers": 32,
    "hidden_size": 1600,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "intermediate_size": 5504,
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 100,
    "num_memory_tokens": 128,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "orig_max_position_embeddings": 2048,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "sliding_window": 1024,
    "global_attn_idx": [0, 15, 31],
    "kv_reuse_group": [
        *([first, first + 1] for first in range(1, 15, 2)),
        [16, 17, 18],
        *([first, first + 1] for first in range(19, 31, 2)),
    ],
}
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
MOST_NAMED = 3


def preset() -> HymbaConfig:
    """The architecture of nvidia/Hymba-1.5B-Base and -Instruct: 1.52 billion weights."""
    return config_from_hf(HYMBA_1_5B)


def config_from_hf(config: dict[str, Any]) -> HymbaConfig:
    """Our config for the content of their config.json.

    Raises ValueError naming fields that are missing, or that ask for what the released models do not do.
    """
    missing = {*FIELDS, *OTHERS} - set(config)
    if missing:
        raise ValueError(f"it has no {_some(missing)}, which a released Hymba's config.json has")
    lacking = [
        f"{name}={config[name]!r}" for name, values in CHOSEN.items() if name in config and config[name] not in values
    ]
    if lacking:
        raise ValueError(f"it asks for {', '.join(lacking)}, and only what the released Hymba models do is here")
    for name in ("hidden_size", "num_hidden_layers", "sliding_window"):
        if type(config[name]) is not int and (name != "sliding_window" or config[name] is not None):
            raise ValueError(f"its {name} is {config[name]!r}, no whole number")
    layers, groups = config["num_hidden_layers"], config["kv_reuse_group"] or []
    if layers > MAX_LAYERS:
        raise ValueError(f"its num_hidden_layers is {layers}, and at most {MAX_LAYERS} can be read")
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"its kv_reuse_group is {str(groups)[:40]!r}, no list of lists of layers")
    fields: dict[str, Any] = {ours: config[theirs] for theirs, ours in FIELDS.items()}
    rank = config["mamba_dt_rank"]
    fields["dt_rank"] = math.ceil(config["hidden_size"] / 16) if rank == "auto" else rank
    fields["rope_scale"] = _rope_scale(config)
    fields["kv_groups"] = [group for group in groups if len(group) > 1] or None
    window = config["sliding_window"]
    if window is None:
        fields["window"], fields["global_layers"] = 1, list(range(layers))
    else:
        # Theirs are the keys before a token, ours count the token's own.
        fields["window"], fields["global_layers"] = window + 1, config["global_attn_idx"] or "none"
    return HymbaConfig.from_dict(OFF | STARTING_POINT | fields)


def _rope_scale(config: dict[str, Any]) -> float:
    kind = config["rope_type"]
    if kind in (None, "default"):
        return 1.0
    wanted, trained = config.get("max_position_embeddings"), config.get("orig_max_position_embeddings")
    if kind != "ntk" or type(wanted) is not int or type(trained) is not int or min(wanted, trained) < 1:
        raise ValueError(
            f"its rope_type {kind!r} with max_position_embeddings={wanted!r} and orig_max_position_embeddings="
            f"{trained!r} is not here: 'ntk' with both of them, or 'default'"
        )
    return wanted / trained


def config_to_hf(config: HymbaConfig) -> dict[str, Any]:
    """config.json as theirs. Raises ValueError for a network that is none of that family."""
    if config.mixer != "official" or config.logit_softcap:
        raise ValueError(
            f"the released models' layout has no place for mixer={config.mixer!r} with logit_softcap="
            f"{config.logit_softcap}: save_pretrained writes ours"
        )
    if len({config.window_of(layer) for layer in range(config.n_layers)} - {None}) > 1:
        raise ValueError("the released models' layout has one sliding window for all layers: layer_windows must agree")
    theirs = {name: getattr(config, ours) for name, ours in FIELDS.items()}
    theirs |= {name: values[0] for name, values in CHOSEN.items()}
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    local = [window for window in windows if window is not None]
    original = 2048
    return theirs | {
        "model_type": MODEL_TYPE,
        "architectures": ["HymbaForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}--configuration_hymba.HymbaConfig",
            "AutoModelForCausalLM": f"{CODE}--modeling_hymba.HymbaForCausalLM",
        },
        "intermediate_size": config.mlp_hidden,
        "mamba_dt_rank": config.resolved_dt_rank,
        "sliding_window": local[0] - 1 if local else None,
        "global_attn_idx": [layer for layer, window in enumerate(windows) if window is None],
        "kv_reuse_group": config.kv_groups,
        "rope_type": "default" if config.rope_scale == 1 else "ntk",
        "orig_max_position_embeddings": original,
        "max_position_embeddings": round(original * config.rope_scale),
        "v_head_dim": config.value_dim,
        "attn_implementation_new": "flex",
        "num_experts_per_tok": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def name_in_hf(name: str) -> str:
    """Their name of one of our tensors. Raises KeyError for one that they do not have."""
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
                f"it {what} {_some(names)}: give the config.json that belongs to these weights, or fetch both again"
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
    """The weights under their names, as they are stored; on the CPU."""
    values = {name_in_hf(name): value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    if "model.memory_tokens" in values:
        values["model.memory_tokens"] = values["model.memory_tokens"][0]
    return values


def load(folder: Path, content: dict[str, Any]) -> Pretrained:
    """What a folder of theirs holds, as a folder of ours; `content` is its config.json.

    Raises FileNotFoundError or PretrainedError naming the file and what is wrong with it.
    """
    try:
        config = config_from_hf(content)
    except ValueError as error:
        raise PretrainedError(f"{folder / CONFIG}: {error}") from error
    tensors = _read_weights(folder)
    try:
        weights = weights_from_hf(config, tensors)
    except ValueError as error:
        raise PretrainedError(f"{folder}: {error}") from error
    return Pretrained(config.to_dict(), weights, None, own_content(config, content))


def own_content(config: HymbaConfig, content: dict[str, Any]) -> dict[str, Any]:
    """The config.json of ours for a network and theirs."""
    ends = {name: content[name] for name in ("eos_token_id", "pad_token_id") if type(content.get(name)) is int}
    return folder_config(config, None, None) | ends


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: fetch the repository's safetensors files"
        )
    index = read_json(folder / INDEX).get("weight_map")
    names = sorted({*index.values()}) if isinstance(index, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise PretrainedError(f"{folder / INDEX} has no weight_map of tensors to files beside it")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {INDEX} names: fetch it")
        tensors |= read_safetensors(folder / name)
    return tensors


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


def _some(names: set[str]) -> str:
    shown = sorted(names)[:MOST_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
