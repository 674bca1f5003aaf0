"""config.json of the released Hymba models (nvidia/Hymba-1.5B-Base and -Instruct) as our config, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from hymba_lightning.model import HymbaConfig
from hymba_lightning.quantization.artifact import MAX_LAYERS

MODEL_TYPE = "hymba"
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
        raise ValueError(f"it has no {some_of(missing)}, which a released Hymba's config.json has")
    lacking = [
        f"{name}={config[name]!r}" for name, values in CHOSEN.items() if name in config and config[name] not in values
    ]
    if lacking:
        raise ValueError(f"it asks for {', '.join(lacking)}, and only what the released Hymba models do is here")
    for name in ("hidden_size", "num_hidden_layers", "sliding_window"):
        if type(config[name]) is not int and (name != "sliding_window" or config[name] is not None):
            raise ValueError(f"its {name} is {config[name]!r}, no whole number")
    layers, whole = config["num_hidden_layers"], config["global_attn_idx"]
    groups = [] if config["kv_reuse_group"] is None else config["kv_reuse_group"]
    if layers > MAX_LAYERS:
        raise ValueError(f"its num_hidden_layers is {layers}, and at most {MAX_LAYERS} can be read")
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"its kv_reuse_group is {str(groups)[:40]!r}, no list of lists of layers")
    if whole is not None and not isinstance(whole, list):
        raise ValueError(f"its global_attn_idx is {str(whole)[:40]!r}, no list of layers")
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
        fields["window"], fields["global_layers"] = window + 1, whole or "none"
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


def some_of(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are."""
    every = sorted(names)
    rest = len(every) - MOST_NAMED
    return ", ".join(every[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
