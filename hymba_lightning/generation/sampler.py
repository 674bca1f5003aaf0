"""Logits → tokens, one after another, on the network's carried state. B prompts, V vocab_size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_lightning.evaluation.carried import read
from hymba_lightning.model import Hymba


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    max_new_tokens: int = 256
    """Most tokens drawn for each prompt."""
    temperature: float = 0.8
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that hold this much of the probability; 1 for all."""
    seed: int = 0
    """Prompt i draws with the seed seed + i, whatever other prompts there are."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text, such as the start of another document."""
    prefill_tokens: int = 2048
    """Prompt tokens read in one forward pass: the memory's bound."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature={self.temperature} and top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability over 0 and at most 1, got {self.top_p}")


def distribution(logits_V: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Token ids, likeliest first, and their probabilities (float64, sum 1) after temperature, top-k and top-p."""
    logits_V = logits_V.detach().cpu().double()
    if config.temperature == 0:
        return logits_V.argmax()[None], torch.ones(1, dtype=torch.float64)
    probabilities, ids = torch.softmax(logits_V / config.temperature, dim=0).sort(descending=True, stable=True)
    keep = config.top_k or ids.numel()
    probabilities, ids = probabilities[:keep], ids[:keep]
    probabilities = probabilities / probabilities.sum()
    if config.top_p < 1:
        # A token stays while those before it hold less than top_p: the first always does.
        stays = probabilities.cumsum(0) - probabilities < config.top_p
        probabilities, ids = probabilities[stays], ids[stays]
    return ids, probabilities / probabilities.sum()


def draw(logits_V: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """One token id."""
    ids, probabilities = distribution(logits_V, config)
    point = torch.rand((), generator=generator, dtype=torch.float64)
    place = torch.searchsorted(probabilities.cumsum(0), point, right=True)
    return int(ids[min(int(place), ids.numel() - 1)])


@torch.no_grad()
def generate(net: Hymba, prompts: list[list[int]], config: SamplingConfig) -> Iterator[list[int | None]]:
    """Continues B prompts of token ids, which may differ in length, each with at least one token.

    Yields one list for each position after the end of the shortest prompt. It holds a token for each row, or None for a
    row that is still reading its prompt or has ended; a stop token is yielded as the row's last one. All rows are at
    the same position, so one state serves them all, and a row that has ended keeps running with its output dropped.

    Raises:
        ValueError: A prompt is empty.
    """
    if not prompts or not all(prompts):
        raise ValueError("each prompt needs at least one token: begin with the document start (BOS)")
    device = net.tok_emb.weight.device
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(prompts))]
    left = [config.max_new_tokens] * len(prompts)
    was_training = net.training
    net.eval()
    position = min(map(len, prompts))
    inputs_BT = torch.tensor([prompt[:position] for prompt in prompts], device=device)
    state = None
    try:
        while True:
            logits_BV, state = read(net, inputs_BT, state, config.prefill_tokens)
            # One copy to the CPU for all rows.
            logits_BV = logits_BV.float().cpu()
            fed, new = [], []
            for row, prompt in enumerate(prompts):
                reading = position < len(prompt)
                token = None
                if not reading and left[row]:
                    token = draw(logits_BV[row], config, generators[row])
                    left[row] = 0 if token in config.stop_ids else left[row] - 1
                new.append(token)
                fed.append(prompt[position] if reading else token or 0)
            if any(token is not None for token in new):
                yield new
            position += 1
            if not any(left):
                return
            inputs_BT = torch.tensor(fed, device=device)[:, None]
    finally:
        net.train(was_training)
