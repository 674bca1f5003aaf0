"""Small pieces shared by the network's parts. B batch, T sequence, D width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_lightning.model.roles import Module, Role, declare, parameter
from hymba_lightning.ops.causal_conv1d import causal_conv1d

# The machine epsilon of float32, whatever dtype the activations have: bfloat16's own (0.008) would swamp the
# embeddings, whose variance starts at 2.5e-5.
RMS_EPS = 1.1920928955078125e-07
# Up to so many tokens projections of the same input are multiplied one after the other.
FEW_ROWS = 16


def rms_norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last axis, without a weight. Any shape, keeps the dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


class Linear(Module, nn.Linear):
    """A matrix without bias, float32 in storage, cast to the activations' dtype where it is used.

    One of torch's linears, so that libraries which look for those (peft) know what it is. `zero_init` marks it for a
    zero start.
    """

    def __init__(self, d_in: int, d_out: int, *, zero_init: bool = False, role: Role = Role.MATRIX) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = d_in, d_out
        self.register_parameter("bias", None)
        self.weight = parameter(torch.empty(d_out, d_in), role)
        self.zero_init = zero_init
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def cast_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in) as the product uses it, in `dtype`."""
        return self.weight.to(dtype)

    def scaled_weight(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`cast_weight` of a matrix whose outputs are multiplied by `scale` (d_out,); None is 1."""
        return self.cast_weight(dtype) if scale is None else (scale[:, None] * self.weight).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.cast_weight(x.dtype))


class Embedding(Module, nn.Embedding):
    """A table (rows, width) looked up by id. One of torch's, as `Linear` is."""

    part = "embedding"

    def __init__(self, rows: int, width: int, std: float, role: Role = Role.TABLE) -> None:
        declare(self, weight=role)
        nn.Embedding.__init__(self, rows, width, _weight=torch.empty(rows, width))
        nn.init.normal_(self.weight, std=std)


class DepthwiseConv(Module):
    """A causal depthwise convolution with SiLU: weight (E, 1, W), bias (E,), in torch's Conv1d layout."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound), Role.CONVOLUTION)
        self.bias = parameter(torch.empty(channels).uniform_(-bound, bound), Role.SCALAR)

    def forward(
        self,
        x_BTE: Tensor,
        state_BEW1: Tensor | None = None,
        doc_position_BT: Tensor | None = None,
        *,
        return_state: bool = False,
        backend: str = "auto",
    ) -> list[Tensor]:
        """(B, T, E) → the result, alike, and with `return_state` the last inputs (B, E, W-1), for what comes next."""
        result = causal_conv1d(
            x_BTE,
            self.weight[:, 0],
            self.bias,
            activation="silu",
            initial_state_BEW1=state_BEW1,
            doc_position_BT=doc_position_BT,
            return_state=return_state,
            backend=backend,
        )
        return list(result) if isinstance(result, tuple) else [result]


class TimeStepProjection(Module):
    """Parameters of dt = softplus(W dt_low + bias): weight (E, R) and bias (E,), which a scan adds in float32."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank)
        self.weight = parameter(torch.empty(channels, rank).uniform_(-bound, bound), Role.DYNAMICS_MATRIX)
        self.bias = parameter(torch.empty(channels).uniform_(-bound, bound), Role.DYNAMICS)

    def draw_bias(self, dt_min: float, dt_max: float) -> None:
        """Sets the bias so that softplus(bias) is log-uniform in [dt_min, dt_max] (Mamba, section 3.6)."""
        with torch.no_grad():
            log_dt = torch.rand_like(self.bias) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
            dt = log_dt.exp()
            # Inverse of softplus, log(exp(dt) - 1), written so that small dt keeps its digits.
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, dt_low: Tensor) -> Tensor:
        """W dt_low, (…, R) → (…, E)."""
        return F.linear(dt_low, self.weight.to(dt_low.dtype))


def is_plain(module: nn.Module) -> bool:
    """Whether it is a `Linear` or an `Embedding` itself, whose weight says all and is a parameter; not e.g. a LoRA
    adapter that was put in its place, nor one whose weight a hook makes before each call, as torch's pruning does."""
    return type(module) in (Linear, Embedding) and "weight" in module._parameters


def table_of(embedding: nn.Embedding) -> Tensor:
    """All its rows as it gives them: where it is not plain, its weight does not say them."""
    if is_plain(embedding):
        return embedding.weight
    return embedding(torch.arange(embedding.weight.size(0), device=embedding.weight.device))


def fused_linear(x: Tensor, linears: list[Linear], sizes: list[int], unit: int) -> Sequence[Tensor]:
    """Several projections of the same input (B, T, D) as one matrix product, cut into outputs (B, T, size).

    `unit`, a divisor of every size, is the granularity of the cut.
    """
    if not all(is_plain(linear) for linear in linears):
        return torch.cat([linear(x) for linear in linears], dim=-1).split(sizes, dim=-1)
    weights = [linear.cast_weight(x.dtype) for linear in linears]
    if x.numel() <= FEW_ROWS * x.size(-1) and not torch.is_grad_enabled():
        # Putting the matrices together would cost more than the products.
        product = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    else:
        product = F.linear(x, torch.cat(weights))
    pieces = product.unflatten(-1, (-1, unit)).split([size // unit for size in sizes], dim=-2)
    return [piece.flatten(-2) for piece in pieces]
