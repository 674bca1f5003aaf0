"""The MLP W_out (leaky_relu(W_in x))² with its hidden layer in Triton; the other products are torch's.

M tokens, D width, F hidden width. A pass over the (M, F) hidden layer is what the MLP's elementwise work costs, so that
it is done where a product has it in registers, and of the hidden layer only the activation is kept. The two kernels
stand behind operators; what connects them is plain Python, which a compiler sees through.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hymba_lightning.ops.leaky_square_mlp.triton_kernels import hidden_backward, hidden_forward
from hymba_lightning.ops.triton_launch import multiprocessors


class Launch(NamedTuple):
    """How a kernel is launched."""

    block: tuple[int, int, int]
    """Rows and columns of a tile, inner elements of one turn."""
    programs: int
    """For each multiprocessor."""
    flatten: bool
    """Whether a program's next tile is loaded while it writes the last one."""
    warps: int
    stages: int
    registers: int = 255
    """At most, of a thread."""


# The best of eight on an H200 at M 65,536, D 512, F 2,048: 0.26 and 0.37 ms, where cuBLAS takes 0.20 for the product
# alone. Both have the columns of a tile in common, by which the signs are stored.
FORWARD = BACKWARD = Launch((128, 128, 64), 1, True, 8, 4)


def _tiles(x_MN: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x_MN, list(x_MN.shape), list(x_MN.stride()), list(block))


def _readable(x_MN: Tensor) -> Tensor:
    """x, or a copy if its rows do not begin at multiples of 16 bytes or their entries are not neighbours."""
    aligned = x_MN.data_ptr() % 16 == 0 and x_MN.stride(0) * x_MN.element_size() % 16 == 0
    plain = x_MN.stride(1) == 1 and x_MN.stride(0) >= x_MN.size(1)
    return x_MN if aligned and plain else x_MN.clone(memory_format=torch.contiguous_format)


def _launch(kernel: Any, how: Launch, tensors: list, shape: tuple[int, int, int], slope: float) -> None:
    device = tensors[0].base.device
    block_m, block_n, block_k = how.block
    programs = min(
        how.programs * multiprocessors(device), triton.cdiv(shape[0], block_m) * triton.cdiv(shape[1], block_n)
    )
    with torch.cuda.device_of(tensors[0].base):
        kernel[(programs,)](
            *tensors,
            *shape,
            SLOPE=slope,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            PROGRAMS=programs,
            FLATTEN=how.flatten,
            num_warps=how.warps,
            num_stages=how.stages,
            maxnreg=how.registers,
            enable_fp_fusion=True,
        )


def _outputs(x_MD: Tensor, w_in_FD: Tensor) -> tuple[Tensor, Tensor]:
    tokens, hidden = x_MD.size(0), w_in_FD.size(0)
    tiles = triton.cdiv(hidden, FORWARD.block[1])
    return x_MD.new_empty(tokens, hidden), x_MD.new_empty(tokens, tiles, 8, dtype=torch.int32)


@torch.library.custom_op("hymba::leaky_square_hidden", mutates_args=())
def hidden_layer(x_MD: Tensor, w_in_FD: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """x W_inᵀ (M, F), negative entries times `slope`, squared; and which were negative, a bit each, (M, tiles, 8)."""
    activation, signs = _outputs(x_MD, w_in_FD)
    if activation.numel():
        x, w_in = _readable(x_MD), _readable(w_in_FD)
        block_m, block_n, block_k = FORWARD.block
        tiles = [_tiles(x, block_m, block_k), _tiles(w_in, block_n, block_k), _tiles(activation, block_m, block_n)]
        _launch(hidden_forward, FORWARD, [*tiles, signs], (*activation.shape, x.size(1)), slope)
    return activation, signs


@hidden_layer.register_fake
def _(x_MD, w_in_FD, slope):
    return _outputs(x_MD, w_in_FD)


@torch.library.custom_op("hymba::leaky_square_hidden_backward", mutates_args=())
def hidden_layer_backward(
    g_MD: Tensor, w_out_DF: Tensor, activation_MF: Tensor, signs_MT8: Tensor, slope: float
) -> Tensor:
    """The gradient of x W_inᵀ (M, F), g being that of the output."""
    g_hidden = torch.empty_like(activation_MF)
    if g_hidden.numel():
        g, w_out = _readable(g_MD), _readable(w_out_DF)
        block_m, block_n, block_k = BACKWARD.block
        tiles = [_tiles(g, block_m, block_k), _tiles(w_out, block_k, block_n)]
        activation, gradient = (_tiles(x, block_m, block_n) for x in (activation_MF, g_hidden))
        _launch(
            hidden_backward, BACKWARD, [*tiles, activation, signs_MT8, gradient], (*g_hidden.shape, g.size(1)), slope
        )
    return g_hidden


@hidden_layer_backward.register_fake
def _(g_MD, w_out_DF, activation_MF, signs_MT8, slope):
    return torch.empty_like(activation_MF)


class LeakySquareMLP(torch.autograd.Function):
    """x (M, D), W_in (F, D), W_out (D, F), slope → (M, D)."""

    @staticmethod
    def forward(ctx, x_MD, w_in_FD, w_out_DF, slope):
        """Keeps x, the activation and the signs under it."""
        activation_MF, signs_MT8 = hidden_layer(x_MD, w_in_FD, slope)
        ctx.save_for_backward(x_MD, w_in_FD, w_out_DF, activation_MF, signs_MT8)
        ctx.slope = slope
        return activation_MF @ w_out_DF.mT

    @staticmethod
    def backward(ctx, g_MD):
        """Gradients of x and both matrices."""
        x_MD, w_in_FD, w_out_DF, activation_MF, signs_MT8 = ctx.saved_tensors
        g_hidden_MF = hidden_layer_backward(g_MD, w_out_DF, activation_MF, signs_MT8, ctx.slope)
        return g_hidden_MF @ w_in_FD, g_hidden_MF.mT @ x_MD, g_MD.mT @ activation_MF, None


def leaky_square_mlp_triton(x: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, slope: float) -> Tensor:
    """x (..., D) → (..., D)."""
    return LeakySquareMLP.apply(x.flatten(0, -2), w_in_FD, w_out_DF, slope).unflatten(0, x.shape[:-1])
