"""Draws tokens from a network, one after another.

A token costs the same time and memory however long the text before it is, because the network's state is carried from
token to token instead of reading the text again. B prompts, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba_lightning.field_types import settle
from hymba_lightning.generation.rows import join, prompt_rows, read_rows
from hymba_lightning.generation.steps import Steps
from hymba_lightning.model import Hymba
from hymba_lightning.model.hymba import HymbaState


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
        settle(self)
        for name in ("max_new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0 or self.top_k < 0:
            raise ValueError(f"temperature={self.temperature} and top_k={self.top_k} must not be negative")
        if not -(2**63) <= self.seed < 2**62:
            raise ValueError(f"seed={self.seed} does not fit into 63 bits")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability over 0 and at most 1, got {self.top_p}")


def distribution(logits_V: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens that may come next, by temperature, then top-k, then top-p.

    Args:
        logits_V: (V,) of the next token, on any device.
        config: Its temperature, top_k and top_p.

    Returns:
        Token ids (n,) int64, likeliest first, and their probabilities (n,) float64, which sum to 1. At temperature 0
        the likeliest token alone.
    """
    logits_V = logits_V.detach().cpu().double()
    if config.temperature == 0:
        return logits_V.argmax()[None], torch.ones(1, dtype=torch.float64)
    # From the largest down: no temperature is so low that it makes infinities of them.
    logits_V = (logits_V - logits_V.max()) / config.temperature
    probabilities, ids = torch.softmax(logits_V, dim=0).sort(descending=True, stable=True)
    keep = config.top_k or ids.numel()
    probabilities, ids = probabilities[:keep], ids[:keep]
    probabilities = probabilities / probabilities.sum()
    if config.top_p < 1:
        # A token stays while those before it hold less than top_p: the first always does.
        stays = probabilities.cumsum(0) - probabilities < config.top_p
        probabilities, ids = probabilities[stays], ids[stays]
    return ids, probabilities / probabilities.sum()


def draw(logits_V: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """One token id from `distribution`, by one number of the CPU generator."""
    ids, probabilities = distribution(logits_V, config)
    point = torch.rand((), generator=generator, dtype=torch.float64)
    place = torch.searchsorted(probabilities.cumsum(0), point, right=True)
    return int(ids[min(int(place), ids.numel() - 1)])


@torch.no_grad()
def generate(
    net: Hymba,
    prompts: list[list[int]] | Tensor,
    config: SamplingConfig,
    mask: Tensor | None = None,
    ended: Container[int] = (),
) -> Iterator[list[int | None]]:
    """Continues B prompts, step by step. Each gets the tokens that it would get alone.

    Args:
        net: The network; its device is used.
        prompts: Token ids, at least one for each prompt: lists of any lengths, or a tensor (B, T).
        config: How tokens are drawn, and what ends a text.
        mask: (B, T) for a tensor of prompts, 0 where padding stands, which each row may have on one side.
        ended: Numbers of rows that the caller wants no more of; looked at after every step.

    Yields:
        For each step a list of B: the row's new token, or None once its text has ended. A stop token is yielded, as the
        last of its row. Rows that have ended cost nothing any more.

    Raises:
        ValueError: a prompt is empty or no token ids of the network's, or the mask marks more than padding on one side.
    """
    rows = prompt_rows(prompts, mask, net.config.vocab_size)
    device = net.tok_emb.weight.device
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(rows))]
    was_training = net.training
    net.eval()
    try:
        ids = [torch.tensor(row, device=device) for row in rows]
        logits_BV, states = read_rows(net, ids, [None] * len(rows), config.prefill_tokens)
        yield from _draw_on(net, logits_BV, join(states), config, generators, ended)
    finally:
        net.train(was_training)


def _draw_on(
    net: Hymba,
    logits_BV: Tensor,
    state: HymbaState,
    config: SamplingConfig,
    generators: list[torch.Generator],
    ended: Container[int],
) -> Iterator[list[int | None]]:
    live, steps = list(range(len(generators))), Steps(net, state)
    for step in range(config.max_new_tokens):
        # One copy to the CPU for all rows.
        on_cpu = logits_BV.float().cpu()
        drawn = [draw(on_cpu[place], config, generators[row]) for place, row in enumerate(live)]
        new: list[int | None] = [None] * len(generators)
        for row, token in zip(live, drawn, strict=True):
            new[row] = token
        yield new
        goes_on = [
            place for place, token in enumerate(drawn) if token not in config.stop_ids and live[place] not in ended
        ]
        if not goes_on or step + 1 == config.max_new_tokens:
            return
        if len(goes_on) < len(live):
            live = [live[place] for place in goes_on]
            steps.select(goes_on)
        fed_B1 = torch.tensor([[drawn[place]] for place in goes_on], device=logits_BV.device)
        logits_BV = steps.read(fed_B1, config.prefill_tokens)
