"""The MLP W_out (leaky_relu(W_in x))² with its hidden layer in Triton; the other products are torch's.

M tokens, D width, F hidden width. A pass over the (M, F) hidden layer is what the MLP's elementwise work costs, so that
it is done where a product has it in registers. The two kernels stand behind operators; what connects them is plain
Python, which a compiler sees through.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hymba_lightning.ops.leaky_square_mlp.triton_kernels import hidden_backward, hidden_forward
from hymba_lightning.ops.triton_launch import multiprocessors

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
# Programs for each multiprocessor; whether a program's next tile is loaded while it writes the last one.
PROGRAMS, FLATTEN = 1, True
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def _tiles(x_MN: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x_MN, list(x_MN.shape), list(x_MN.stride()), list(block))


def _readable(x_MN: Tensor) -> Tensor:
    """x, or a copy if its rows do not begin at multiples of 16 bytes or their entries are not neighbours."""
    aligned = x_MN.data_ptr() % 16 == 0 and x_MN.stride(0) * x_MN.element_size() % 16 == 0
    plain = x_MN.stride(1) == 1 and x_MN.stride(0) >= x_MN.size(1)
    return x_MN if aligned and plain else x_MN.clone(memory_format=torch.contiguous_format)


def _launch(kernel, inputs: list[TensorDescriptor], shape: tuple[int, int, int], slope: float,  # type: ignore[no-untyped-def]
            device: torch.device) -> None:
    programs = min(PROGRAMS * multiprocessors(device), triton.cdiv(shape[0], BLOCK_M) * triton.cdiv(shape[1], BLOCK_N))
    with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
        kernel[(programs,)](*inputs, *shape, SLOPE=slope, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
                            PROGRAMS=programs, FLATTEN=FLATTEN, **OPTIONS)


@torch.library.custom_op("hymba::leaky_square_hidden", mutates_args=())
def hidden_layer(x_MD: Tensor, w_in_FD: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """x W_inᵀ (M, F), and it with negative entries times `slope`, squared."""
    hidden = x_MD.new_empty(x_MD.size(0), w_in_FD.size(0))
    activation = torch.empty_like(hidden)
    if hidden.numel():
        x, w_in = _readable(x_MD), _readable(w_in_FD)
        tiles = [_tiles(x, BLOCK_M, BLOCK_K), _tiles(w_in, BLOCK_N, BLOCK_K), _tiles(hidden, BLOCK_M, BLOCK_N // 2),
                 _tiles(activation, BLOCK_M, BLOCK_N // 2)]
        _launch(hidden_forward, tiles, (*hidden.shape, x.size(1)), slope, x.device)
    return hidden, activation


@hidden_layer.register_fake
def _(x_MD, w_in_FD, slope):  # type: ignore[no-untyped-def]
    hidden = x_MD.new_empty(x_MD.size(0), w_in_FD.size(0))
    return hidden, torch.empty_like(hidden)


@torch.library.custom_op("hymba::leaky_square_hidden_backward", mutates_args=())
def hidden_layer_backward(g_MD: Tensor, w_out_DF: Tensor, hidden_MF: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """The gradient of x W_inᵀ (M, F), g being that of the output, and the activation."""
    g_hidden, activation = torch.empty_like(hidden_MF), torch.empty_like(hidden_MF)
    if hidden_MF.numel():
        g, w_out = _readable(g_MD), _readable(w_out_DF)
        tiles = [_tiles(g, BLOCK_M, BLOCK_K), _tiles(w_out, BLOCK_K, BLOCK_N)]
        tiles += [_tiles(x, BLOCK_M, BLOCK_N // 2) for x in (hidden_MF, activation, g_hidden)]
        _launch(hidden_backward, tiles, (*hidden_MF.shape, g.size(1)), slope, g.device)
    return g_hidden, activation


@hidden_layer_backward.register_fake
def _(g_MD, w_out_DF, hidden_MF, slope):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden_MF), torch.empty_like(hidden_MF)


class LeakySquareMLP(torch.autograd.Function):
    """x (M, D), W_in (F, D), W_out (D, F), slope → (M, D)."""

    @staticmethod
    def forward(ctx, x_MD, w_in_FD, w_out_DF, slope):  # type: ignore[no-untyped-def]
        """Keeps x and W_in x; the activation is made again in the pass that needs its gradient."""
        hidden_MF, activation_MF = hidden_layer(x_MD, w_in_FD, slope)
        ctx.save_for_backward(x_MD, w_in_FD, w_out_DF, hidden_MF)
        ctx.slope = slope
        return activation_MF @ w_out_DF.mT

    @staticmethod
    def backward(ctx, g_MD):  # type: ignore[no-untyped-def]
        """Gradients of x and both matrices."""
        x_MD, w_in_FD, w_out_DF, hidden_MF = ctx.saved_tensors
        g_hidden_MF, activation_MF = hidden_layer_backward(g_MD, w_out_DF, hidden_MF, ctx.slope)
        return g_hidden_MF @ w_in_FD, g_hidden_MF.mT @ x_MD, g_MD.mT @ activation_MF, None
