"""The tiny network and stream that the rules of the score are tried on, and its honest evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hymba_lightning.data.token_stream import Chunk
from hymba_lightning.evaluation import TTTConfig, score_first_ttt
from hymba_lightning.model import Hymba, HymbaConfig

VOCAB, SEQ_LEN, CHUNK, N_TOKENS = 12, 24, 60, 60 * 3 + 17
NET = HymbaConfig(
    vocab_size=VOCAB,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    window=8,
    d_state=4,
    bigram_buckets=32,
    bigram_dim=8,
    tied_embed_std=0.3,
)

ADAPT = {"epochs": 1, "lr": 0.05, "freeze_blocks": 0, "batch_seqs": 2}
MODES: dict[str, dict[str, Any]] = {
    "cold": {},
    "sliding": {"mode": "sliding", "stride": 7},
    "carried": {"mode": "carried", "warm_tokens": 30},
    "carried anew": {"mode": "carried", "warm_tokens": 30, "state_after_update": "rewarm"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"parameters": "mlp"},
    "scalars": {"parameters": "scalars"},
    "low rank": {"parameters": "low_rank", "rank": 3},
    "muon": {"optimizer": "muon", "lr": 0.01},
    "muon and sgd": {"optimizer": "muon", "lr": 0.01, "rest_lr": 0.05},
    "anchored": {"anchor": 0.1},
    "documents": {"reset_at_bos": True},
    "short sequences": {"train_seq_len": 10, "lr_decay": "constant"},
}


def lively_net(config: HymbaConfig = NET) -> Hymba:
    """The same network every time, its zero-initialised parts filled."""
    torch.manual_seed(0)
    net = Hymba(config)
    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def stream(n_tokens: int = N_TOKENS) -> Tensor:
    """Random tokens with a few document starts (id 1)."""
    tokens = torch.randint(2, VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
    tokens[[0, 25, 90, 100]] = 1
    return tokens[:n_tokens]


def chunks(tokens: Tensor, chunk_tokens: int = CHUNK) -> list[Chunk]:
    """The stream in chunks, three bytes a token."""
    n = tokens.numel() - 1
    n_chunks = -(-n // chunk_tokens)
    return [
        Chunk(
            i,
            n_chunks,
            tokens[i * chunk_tokens : (i + 1) * chunk_tokens + 1],
            torch.full((min(chunk_tokens, n - i * chunk_tokens),), 3, dtype=torch.int16),
            i * chunk_tokens,
        )
        for i in range(n_chunks)
    ]


def evaluation(**config: Any) -> Callable[[Tensor], Tensor]:
    """The public evaluation function, as the rules want it: from a fresh network each time."""

    def score(tokens: Tensor) -> Tensor:
        scored = score_first_ttt(lively_net(), chunks(tokens), SEQ_LEN, TTTConfig(**config), stream=tokens)
        return torch.cat([chunk.nats for chunk in scored])

    return score
