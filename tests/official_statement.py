"""What the released Hymba models compute, said once more in plain torch: one sequence, loops over heads and tokens, and
the names of their files. Nothing of hymba_lightning is used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# A small member of the family: global layers, a group of two and one of three, odd sizes everywhere.
SMALL: dict[str, Any] = {
    "model_type": "hymba",
    "vocab_size": 96,
    "num_hidden_layers": 7,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "mamba_expand": 2,
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 3,
    "num_memory_tokens": 5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "orig_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 8,
    "global_attn_idx": [0, 3],
    "kv_reuse_group": [[1, 2], [4, 5, 6]],
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a size at which every part has a say."""
    generator = torch.Generator().manual_seed(seed)
    d, e, v = config["hidden_size"], config["mamba_expand"] * config["hidden_size"], config["vocab_size"]
    heads, kv, f = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    n, rank, taps = config["mamba_d_state"], config["mamba_dt_rank"], config["mamba_d_conv"]
    readers = {layer for group in config["kv_reuse_group"] or [] for layer in group[1:]}

    def draw(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)

    def gains(width: int) -> Tensor:
        return 1 + draw(width, scale=0.2)

    weights = {"model.embed_tokens.weight": draw(v, d, scale=0.7), "model.final_layernorm.weight": gains(d)}
    if config["num_memory_tokens"]:
        weights["model.memory_tokens"] = draw(config["num_memory_tokens"], d, scale=0.7)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(v, d)
    for layer in range(config["num_hidden_layers"]):
        own_kv = 0 if layer in readers else kv * (d + e) // heads
        parts = {
            "input_layernorm.weight": gains(d),
            "pre_moe_layernorm.weight": gains(d),
            "moe.experts.0.gate_proj.weight": draw(f, d),
            "moe.experts.0.up_proj.weight": draw(f, d),
            "moe.experts.0.down_proj.weight": draw(d, f),
            "mamba.in_proj.weight": draw(d + own_kv + 2 * e, d, scale=1.5 * d**-0.5),
            "mamba.out_proj.weight": draw(d, e),
            "mamba.conv1d.weight": draw(e, 1, taps, scale=0.5),
            "mamba.conv1d.bias": draw(e, scale=0.2),
            "mamba.x_proj.0.weight": draw(rank + 2 * n, e),
            "mamba.dt_proj.0.weight": draw(e, rank),
            "mamba.dt_proj.0.bias": draw(e, scale=0.5) - 2,
            "mamba.A_log.0": torch.arange(1.0, n + 1).log() + draw(e, n, scale=0.1),
            "mamba.D.0": gains(e),
            "mamba.dt_layernorm.weight": gains(rank),
            "mamba.B_layernorm.weight": gains(n),
            "mamba.C_layernorm.weight": gains(n),
            "mamba.pre_avg_layernorm1.weight": gains(e),
            "mamba.pre_avg_layernorm2.weight": gains(e),
        }
        weights |= {f"model.layers.{layer}.{name}": value for name, value in parts.items()}
    return weights


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) of one sequence."""
    eps, meta = config["rms_norm_eps"], config["num_memory_tokens"]
    x = weights["model.embed_tokens.weight"][ids]
    if meta:
        x = torch.cat([weights["model.memory_tokens"], x])
    leader = {layer: group[0] for group in config["kv_reuse_group"] or [] for layer in group}
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in range(config["num_hidden_layers"]):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        local = config["sliding_window"] is not None and layer not in (config["global_attn_idx"] or [])
        first = leader.get(layer, layer)
        mixed, made[layer] = mix(config, own, norm(x, own["input_layernorm.weight"], eps), local, made.get(first))
        x = x + mixed
        y = norm(x, own["pre_moe_layernorm.weight"], eps)
        gate = y @ own["moe.experts.0.gate_proj.weight"].T
        up = y @ own["moe.experts.0.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["moe.experts.0.down_proj.weight"].T
    x = norm(x, weights["model.final_layernorm.weight"], eps)[meta:]
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the last axis."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def mix(
    config: dict[str, Any], w: dict[str, Tensor], x: Tensor, local: bool, kv: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The two branches side by side, and the keys and values that attention read."""
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    e, eps = config["mamba_expand"] * d, config["rms_norm_eps"]
    key_width, value_width = d // heads, e // heads
    sizes = [d, *([] if kv else [kv_heads * key_width, kv_heads * value_width]), e, e]
    q, *own_kv, u, z = (x @ w["mamba.in_proj.weight"].T).split(sizes, dim=1)
    if kv is None:
        kv = turned(config, own_kv[0].view(len(x), kv_heads, key_width)), own_kv[1].view(len(x), kv_heads, value_width)
    q = turned(config, q.view(len(x), heads, key_width))
    attended = attention(q, *kv, config["sliding_window"] if local else None, config["num_memory_tokens"])
    one = norm(attended, w["mamba.pre_avg_layernorm1.weight"], eps)
    two = norm(scan(config, w, u, z), w["mamba.pre_avg_layernorm2.weight"], eps)
    return (one + two) / 2 @ w["mamba.out_proj.weight"].T, kv


def turned(config: dict[str, Any], x: Tensor) -> Tensor:
    """Halves of each head (tokens, heads, width) as complex numbers, turned by the position times a frequency each."""
    width, base = x.size(2), config["rope_theta"]
    if config["rope_type"] == "ntk":
        scale = config["max_position_embeddings"] / config["orig_max_position_embeddings"]
        base *= (2 * scale - 1) ** (width / (width - 2))
    frequency = torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x.chunk(2, dim=2)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, reach: int | None, meta: int) -> Tensor:
    """Each token sees itself, `reach` tokens before it and the first `meta`; None reaches all."""
    place = torch.arange(len(q))
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & ((distance <= (len(q) if reach is None else reach)) | (place[None, :] < meta))
    shared = q.size(1) // k.size(1)
    outputs = []
    for head in range(q.size(1)):
        scores = q[:, head] @ k[:, head // shared].T / math.sqrt(q.size(2))
        outputs.append(torch.where(seen, scores, -math.inf).softmax(1) @ v[:, head // shared])
    return torch.cat(outputs, dim=1)


def scan(config: dict[str, Any], w: dict[str, Tensor], u: Tensor, z: Tensor) -> Tensor:
    """Convolution, then the recurrence token by token, gated."""
    n, rank, taps = config["mamba_d_state"], config["mamba_dt_rank"], config["mamba_d_conv"]
    eps, filters = config["rms_norm_eps"], w["mamba.conv1d.weight"][:, 0]
    padded = torch.cat([u.new_zeros(taps - 1, u.size(1)), u])
    u = sum(padded[tap : tap + len(u)] * filters[:, tap] for tap in range(taps)) + w["mamba.conv1d.bias"]
    u = u * torch.sigmoid(u)
    low, b, c = (u @ w["mamba.x_proj.0.weight"].T).split([rank, n, n], dim=1)
    low = norm(low, w["mamba.dt_layernorm.weight"], eps)
    b, c = norm(b, w["mamba.B_layernorm.weight"], eps), norm(c, w["mamba.C_layernorm.weight"], eps)
    step = torch.log1p(torch.exp(low @ w["mamba.dt_proj.0.weight"].T + w["mamba.dt_proj.0.bias"]))
    rate = -w["mamba.A_log.0"].exp()
    state, outputs = u.new_zeros(rate.shape), []
    for t in range(len(u)):
        state = (step[t][:, None] * rate).exp() * state + (step[t] * u[t])[:, None] * b[t]
        outputs.append(state @ c[t] + w["mamba.D.0"] * u[t])
    return torch.stack(outputs) * z * torch.sigmoid(z)
