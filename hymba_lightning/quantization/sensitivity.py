"""What each weight matters to the loss, measured on a network before it is rounded.

The sensitivity is the diagonal of the Fisher information: weights that move by δ change what the network predicts by
KL(p ‖ p') ≈ ½ Σ s δ² nats a token, where s is the mean, per token, of the squared gradient of log p(y) with y drawn
from p itself. Drawn so, the gradients of a sequence's tokens are uncorrelated: the square of their sum is a sample of
the sum of their squares, and one backward pass a sequence is enough. Terms between two weights drop out as far as their
rounding errors are independent.
R rows, C columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.model.config import HymbaConfig
from hymba_lightning.model.hymba import Hymba
from hymba_lightning.model.layers import Linear
from hymba_lightning.model.roles import Role

# A sequence gives one sample however long it is.
SPAN = 2048


class Fisher(NamedTuple):
    """Parts of the Fisher information, by the weights' names; a weight that several layers share is one tensor under
    each of its names."""

    sensitivities: dict[str, Tensor]
    """Its diagonal, in nats a token: float32 in the weight's shape."""
    columns: dict[str, Tensor]
    """Of tables and other matrices of which no `Linear` sees the inputs: the sum over rows of its blocks, float32
    (C, C). To GPTQ it is what a layer's inputs are to others. A sequence is one sample of each row: matrices of fewer
    rows than columns have none, since it would know a few directions only and call the others free."""


@torch.enable_grad()
def collect_fisher(net: Hymba, batches: Iterable[Tensor], seed: int = 0) -> Fisher:
    """From the first tokens of each sequence in `batches` of token ids (B, T), on the net's device.

    Touches no gradient that the network holds. Raises ValueError without any batch.
    """
    parameters = dict(net.named_parameters())
    seen = {id(module.weight) for module in net.modules() if isinstance(module, Linear)}
    products = {
        name: parameter.new_zeros(parameter.shape[-1], parameter.shape[-1], dtype=torch.float32)
        for name, parameter in parameters.items()
        if parameter.ndim == 2 and id(parameter) not in seen and parameter.shape[0] >= parameter.shape[1] > 1
    }
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(seed)
    n_tokens = 0
    for batch in batches:
        for inputs in batch[:, :SPAN].split(1):
            hidden_BTD, _ = net.hidden(inputs)
            logits_NV = net.logits(hidden_BTD).flatten(0, 1).float()
            drawn_N = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)[:, 0]
            nats = F.cross_entropy(logits_NV, drawn_N, reduction="sum")
            gradients = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    gradient = gradient.float()
                    squares[name].addcmul_(gradient, gradient)
                    if name in products:
                        products[name].addmm_(gradient.T, gradient)
            n_tokens += inputs.numel()
    if not n_tokens:
        raise ValueError("no batches: there is nothing to measure sensitivities on")

    def under_all_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
        by_id = {id(parameters[name]): tensor.div_(n_tokens) for name, tensor in found.items()}
        everywhere = net.named_parameters(remove_duplicate=False)
        return {name: by_id[id(parameter)] for name, parameter in everywhere if id(parameter) in by_id}

    return Fisher(under_all_names(squares), under_all_names(products))


def random_batches(config: HymbaConfig, n: int = 16, length: int = 1024, seed: int = 0) -> Iterator[Tensor]:
    """n sequences (1, length) of uniformly drawn ids behind a BOS.

    Sensitivities differ a hundred-thousandfold between tensors, and on random ids they are within some 40 % of those on
    text: enough to tell where bits belong where there is no text to ask, and no training data is used.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        ids[0, 0] = config.bos_id
        yield ids


def plain_sensitivity(role: Role, weight: Tensor) -> Tensor:
    """A stand-in where nothing was measured: every tensor's relative squared error counts the same, 100 times as much
    that of the token table and the head, which every prediction passes through."""
    importance = 100.0 if role in (Role.EMBEDDING, Role.HEAD) else 1.0
    energy = float(weight.detach().double().square().sum())
    return torch.full_like(weight, importance / max(energy, 1e-30), dtype=torch.float32)
