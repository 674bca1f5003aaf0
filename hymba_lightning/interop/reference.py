"""The reference run's networks as ours and back, and its files as our artifacts.

The reference's constructor arguments and state-dict names are facts of its files; the functions here only rename.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.interop.checkpoint import ReferenceFileError, ReferenceWeights, read_reference_file
from hymba_lightning.model import Hymba, HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import QuantizationConfig, save_artifact

# The reference's constructor argument → our field. Every one is needed to rebuild a network, so none has a default.
FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layers",
    "model_dim": "d_model",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "mlp_mult": "mlp_mult",
    "hymba_expand": "expand",
    "hymba_ssm_state": "d_state",
    "hymba_conv_kernel": "d_conv",
    "hymba_dt_rank": "dt_rank",
    "kv_share_every": "kv_share_every",
    "meta_tokens": "meta_tokens",
    "tie_embeddings": "tie_embeddings",
    "tied_embed_init_std": "tied_embed_std",
    "use_smeargate": "smear_gate",
    "use_bigram_hash": "bigram_hash",
    "bigram_buckets": "bigram_buckets",
    "bigram_hash_dim": "bigram_dim",
    "rope_base": "rope_base",
    "qk_gain_init": "qk_gain",
    "logit_softcap": "logit_softcap",
    "use_ortho_init": "ortho_init",
}
# sliding_window and swa_global_layers need more than another name.
WINDOW, GLOBAL_LAYERS = "sliding_window", "swa_global_layers"
# What the reference does and has no argument for.
FIXED: dict[str, Any] = {"reset_at_bos": False, "merge": "scalar", "branch_norm": False, "mlp_slope": 0.9}
STARTING_POINT: dict[str, Any] = {"dt_init": "linear"}
META_TOKENS = "_meta_tokens_param"


def config_from_reference(config: dict[str, Any]) -> HymbaConfig:
    """Our config for the reference's constructor arguments.

    Raises ValueError naming arguments that are missing or unknown, or a value that no network can have.
    """
    known = {*FIELDS, WINDOW, GLOBAL_LAYERS}
    missing, unknown = sorted(known - set(config)), sorted(set(config) - known)
    if missing or unknown:
        raise ValueError(f"the reference's config does not fit: missing {missing}, unknown {unknown}")
    fields: dict[str, Any] = {ours: config[theirs] for theirs, ours in FIELDS.items()}
    global_layers: str | list[int] = parse_layers(config[GLOBAL_LAYERS])
    window = config[WINDOW]
    if window <= 0:  # the reference's way to say full attention everywhere
        window, global_layers = 1, list(range(config["num_layers"]))
    return HymbaConfig(**fields, **FIXED, **STARTING_POINT, window=window, global_layers=global_layers)


def parse_layers(layers: str | list[int]) -> str | list[int]:
    """'none', 'auto', or layer numbers: a list, or a text with commas as the reference's environment has it."""
    if not isinstance(layers, str) or layers in ("none", "auto"):
        return layers
    try:
        return [int(number) for number in layers.split(",") if number.strip()]
    except ValueError as error:
        raise ValueError(f"{GLOBAL_LAYERS}={layers!r} is neither none, auto nor layer numbers: {error}") from error


def config_to_reference(config: HymbaConfig) -> dict[str, Any]:
    """Inverse of `config_from_reference`. Raises ValueError naming options that the reference does not have."""
    lacking = [f"{name}={getattr(config, name)!r}" for name, value in FIXED.items() if getattr(config, name) != value]
    if lacking:
        raise ValueError(f"the reference has no network with {', '.join(lacking)}; it has {FIXED}")
    result = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    result[WINDOW], result[GLOBAL_LAYERS] = config.window, config.global_layers
    if config.global_layer_set() == set(range(config.n_layers)):
        result[WINDOW], result[GLOBAL_LAYERS] = 0, "none"
    return result


def from_reference(
    config: dict[str, Any], state_dict: dict[str, Tensor], runtime: RuntimeConfig | None = None
) -> Hymba:
    """The network of the reference's constructor arguments and weights; it computes what the reference computes.

    `state_dict` has the reference's names; a projection shared by several layers may be there once or for each.
    Raises ValueError naming arguments or tensors that are missing, unknown or of the wrong shape.
    """
    own_config = config_from_reference(config)
    # Shapes first, without memory: a hostile file may describe a network far larger than its tensors.
    with torch.device("meta"):
        own = Hymba(own_config).state_dict()
    weights = rename(state_dict)
    for name in own:
        leader = kv_leader(name, own_config.kv_share_every)
        if name not in weights and leader in weights:
            weights[name] = weights[leader]
        elif leader in weights and not torch.equal(weights[name], weights[leader]):
            raise ValueError(
                f"{name} and {leader} share one projection (kv_share_every="
                f"{own_config.kv_share_every}), but their weights differ"
            )
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or unknown:
        raise ValueError(f"the reference's weights do not fit its config: missing {missing}, unknown {unknown}")
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"the reference's weights do not fit its config: {', '.join(wrong)}")
    net = Hymba(own_config, runtime)
    net.load_state_dict(weights)
    return net


def to_reference(net: Hymba) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reference's constructor arguments and state dict (float32 copies) of a network.

    Raises ValueError naming options of the network that the reference does not have.
    """
    state_dict = {
        META_TOKENS if name == "meta_tokens" else name: tensor.detach().float().cpu().clone()
        for name, tensor in net.state_dict().items()
    }
    return config_to_reference(net.config), state_dict


def rename(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's names as ours: without the prefixes that DDP and torch.compile add."""
    renamed = {}
    for name, tensor in state_dict.items():
        ours = name.removeprefix("module.").removeprefix("_orig_mod.")
        renamed["meta_tokens" if ours == META_TOKENS else ours] = tensor
    return renamed


def kv_leader(name: str, share_every: int) -> str | None:
    """The name under which a layer's shared key/value projection is first known; None for any other tensor."""
    parts = name.split(".")
    if parts[0] != "blocks" or parts[2:] != ["attn", "kv_proj", "weight"]:
        return None
    layer = int(parts[1])
    return f"blocks.{layer - layer % share_every}.attn.kv_proj.weight"


def infer_config(
    state_dict: dict[str, Tensor], *, window: int, global_layers: str, rope_base: float, logit_softcap: float
) -> dict[str, Any]:
    """The reference's constructor arguments as far as tensors tell them; the four that they do not are given.

    Raises ReferenceFileError where the tensors are not those of a Hymba network of the reference.
    """
    weights = rename(state_dict)
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    n_layers = len(layers)
    if layers != {str(layer) for layer in range(n_layers)}:
        raise ReferenceFileError("its blocks are not numbered from 0 without gaps")
    try:
        vocab_size, d_model = weights["tok_emb.weight"].shape
        (n_heads,) = weights["blocks.0.attn.q_gain"].shape
        d_inner, _, d_conv = weights["blocks.0.attn.conv1d.weight"].shape
        d_state = weights["blocks.0.attn.A_log"].shape[1]
        dt_rank = weights["blocks.0.attn.dt_proj.weight"].shape[1]
        kv_rows = weights["blocks.0.attn.kv_proj.weight"].shape[0]
        mlp_rows = weights["blocks.0.mlp.fc.weight"].shape[0]
        buckets, bigram_dim = (
            weights["bigram_hash.table.weight"].shape if "bigram_hash.table.weight" in weights else (4096, 128)
        )
        n_meta = weights["meta_tokens"].shape[1] if "meta_tokens" in weights else 0
    except KeyError as error:
        raise ReferenceFileError(f"it has no tensor {error}, which every Hymba network of the reference has") from error
    except (ValueError, IndexError) as error:
        raise ReferenceFileError(f"a tensor has an unexpected number of axes ({error})") from error
    if d_model % n_heads:
        raise ReferenceFileError(f"its width {d_model} is not a multiple of its {n_heads} heads")
    return {
        "vocab_size": vocab_size,
        "num_layers": n_layers,
        "model_dim": d_model,
        "num_heads": n_heads,
        "num_kv_heads": kv_rows // 2 // (d_model // n_heads),
        "mlp_mult": mlp_rows // d_model,
        "hymba_expand": d_inner // d_model,
        "hymba_ssm_state": d_state,
        "hymba_conv_kernel": d_conv,
        "hymba_dt_rank": dt_rank,
        "kv_share_every": shared_layers(weights, n_layers),
        "meta_tokens": n_meta,
        "tie_embeddings": "lm_head.weight" not in weights,
        "tied_embed_init_std": 0.005,
        "use_smeargate": "smeargate.gate" in weights,
        "use_bigram_hash": "bigram_hash.table.weight" in weights,
        "bigram_buckets": buckets,
        "bigram_hash_dim": bigram_dim,
        "rope_base": rope_base,
        "qk_gain_init": 1.5,
        "logit_softcap": logit_softcap,
        "use_ortho_init": True,
        WINDOW: window,
        GLOBAL_LAYERS: global_layers,
    }


def shared_layers(weights: dict[str, Tensor], n_layers: int) -> int:
    """How many layers in a row use the key/value projection of layer 0."""
    first = weights["blocks.0.attn.kv_proj.weight"]
    for layer in range(1, n_layers):
        own = weights.get(f"blocks.{layer}.attn.kv_proj.weight")
        if own is not None and not torch.equal(own, first):
            return layer
    return n_layers


def import_reference(
    path: str,
    out: str | None = None,
    tokenizer: str | None = None,
    window: int = 512,
    global_layers: str = "none",
    rope_base: float = 10000.0,
    logit_softcap: float = 30.0,
) -> str:
    """Turns the reference run's file into an artifact with the very same weights, ready for `hymba test`.

    Args:
        path: final_model.pt or final_model.int8.ptz.
        out: The artifact to write; null puts it beside `path` with the ending .hymba.
        tokenizer: The SentencePiece model that the network was trained with; its fingerprint goes into the artifact.
        window: Keys a token saw in training, itself included; the file does not tell. 0 means all.
        global_layers: Layers with full attention: none, auto (first, middle, last) or numbers with commas.
        rope_base: Base of the rotary position embedding.
        logit_softcap: Logits are softcap * tanh(logits / softcap).
    """
    source = Path(path)
    destination = Path(out) if out else source.with_name(source.name.split(".")[0] + ".hymba")
    weights = read_reference_file(source)
    try:
        config = infer_config(
            weights.state_dict,
            window=window,
            global_layers=global_layers,
            rope_base=rope_base,
            logit_softcap=logit_softcap,
        )
        net = from_reference(config, weights.state_dict)
    except ValueError as error:
        raise ReferenceFileError(f"{source} holds no network of the reference: {error}") from error
    fingerprint: dict[str, Any] = {"vocab_size": net.config.vocab_size}
    if tokenizer is not None:
        fingerprint["sha256"] = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    save_artifact(
        destination,
        net.state_dict(),
        config=net.config.to_dict(),
        tokenizer=fingerprint,
        metadata={"imported_from": source.name},
        scheme=lossless(net),
        quantized=quantized_by_name(weights, net),
    )
    return str(destination)


def lossless(net: Hymba) -> QuantizationConfig:
    """Keeps every tensor's value: float16 where that is exact, else float32."""
    inexact = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor.half().float(), tensor)]
    return QuantizationConfig(float32_names=inexact, float16_names=[""])


def quantized_by_name(weights: ReferenceWeights, net: Hymba) -> dict:
    """The file's own integers and scales under our names, for each sharer of a projection."""
    known = {next(iter(rename({name: tensor.q}))): tensor for name, tensor in weights.quantized.items()}
    result = {}
    for name in net.state_dict():
        tensor = known.get(name) or known.get(kv_leader(name, net.config.kv_share_every) or "")
        if tensor is not None:
            result[name] = tensor
    return result
