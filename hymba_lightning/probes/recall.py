"""Values that belong to keys, asked for after so many tokens: passkey (one pair) and associative recall (several).

A trained language model has never seen the task, so a copy of it is trained on it for a few steps first. Sources: Arora
et al., "Zoology" (arXiv:2312.04927) for the task and why it tells recurrent from attending memory apart.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_lightning.model import Hymba

KEY, VALUE = 2, 2  # tokens of a key, and of its value


class Recall(NamedTuple):
    """Questions asked `distance` tokens after the pair that answers them."""

    pairs: int
    distance: int
    questions: int
    right: float
    """Share of the value's tokens that have the highest probability."""
    error: float
    """Its standard error, the questions taken as independent."""


def recall(
    net: Hymba,
    stream: Tensor,
    length: int,
    *,
    pairs: int,
    steps: int = 60,
    batch: int = 4,
    lr: float = 1e-3,
    questions: int = 64,
    seed: int = 0,
) -> list[Recall]:
    """Trains a copy of `net` on the task over distances up to `length`, then asks. `net` stays as it is.

    Args:
        net: The network.
        stream: Tokens (n,) of real text on its device, which stand around and between the pairs.
        length: Tokens of a sequence: the longest distance is nearly that.
        pairs: Keys with values in each sequence, of which one is asked for.
        steps: Training steps of Adam, each of `batch` sequences.
        batch: Sequences of a step.
        lr: Its learning rate, falling to zero.
        questions: Asked at each distance, at least 2.
        seed: Draws the same texts, keys and values again.

    Raises:
        ValueError: a sequence too short for the pairs, or a stream shorter than a sequence.
    """
    shortest = pairs * (KEY + VALUE) + KEY + VALUE
    if length < 2 * shortest or stream.numel() <= length + 1:
        raise ValueError(f"{length:,} tokens are too few for {pairs} pairs, or more than the text has")
    generator = torch.Generator().manual_seed(seed)
    learner = copy.deepcopy(net).train()
    parameters = list(learner.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    marker = net.config.vocab_size - 1  # a rare piece, in every tokenizer
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        tokens = torch.stack([_sequence(stream, length, pairs, None, marker, generator) for _ in range(batch)])
        nats_of_values(learner, tokens).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.eval()
    found = []
    for distance in asked_at(length, shortest):
        right = 0
        for at_once in torch.arange(questions).split(batch):
            tokens = torch.stack([_sequence(stream, length, pairs, distance, marker, generator) for _ in at_once])
            with torch.no_grad():
                hidden_BTD, _ = learner.hidden(tokens[:, :-1])
                guesses = learner.logits(hidden_BTD[:, -VALUE:]).argmax(-1)
            right += int((guesses == tokens[:, -VALUE:]).sum())
        share = right / (questions * VALUE)
        found.append(Recall(pairs, distance, questions, share, (share * (1 - share) / questions) ** 0.5))
    return found


def nats_of_values(net: Hymba, tokens: Tensor) -> Tensor:
    """Nats (B·VALUE,) of the last VALUE of tokens (B, T+1). Logits are made for these alone, since the head is most of
    a small network's work."""
    hidden_BTD, _ = net.hidden(tokens[:, :-1])
    return net.nats(net.raw_logits(hidden_BTD[:, -VALUE:]).flatten(0, 1), tokens[:, -VALUE:].flatten())


def asked_at(length: int, shortest: int) -> list[int]:
    """Powers of two from `shortest` up and the farthest distance of a sequence."""
    farthest = length - KEY - VALUE
    return [*(1 << b for b in range(64) if shortest <= 1 << b < farthest), farthest]


def _sequence(
    stream: Tensor, length: int, pairs: int, distance: int | None, marker: int, generator: torch.Generator
) -> Tensor:
    """(length+1,) tokens of text in which pairs stand, the asked one `distance` before the question at the end.

    A pair is a marker and a key's tokens, of which the first is the marker, then the value's; keys and values are
    tokens of the text drawn at random.
    """
    start = int(torch.randint(0, stream.numel() - length - 1, (), generator=generator))
    tokens = stream[start : start + length + 1].clone()
    question = length + 1 - KEY - VALUE
    farthest = question
    if distance is None:
        low, high = torch.tensor([float(KEY + VALUE), float(farthest)]).log().tolist()
        distance = int(torch.empty(()).uniform_(low, high, generator=generator).exp())
    asked = question - min(max(distance, KEY + VALUE), farthest)
    picked = torch.randint(0, stream.numel(), (pairs, KEY - 1 + VALUE), generator=generator)
    contents = stream[picked.to(stream.device)]
    # The others stand anywhere that is free.
    taken = [asked]
    for _ in range(1000):
        if len(taken) == pairs:
            break
        place = int(torch.randint(0, question - KEY - VALUE + 1, (), generator=generator))
        if all(abs(place - other) >= KEY + VALUE for other in taken):
            taken.append(place)
    for place, content in zip(taken, contents, strict=False):
        tokens[place] = marker
        tokens[place + 1 : place + KEY + VALUE] = content
    tokens[question] = marker
    tokens[question + 1 :] = contents[0]
    return tokens
