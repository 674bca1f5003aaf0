"""GPTQ (arXiv:2210.17323): rounds a matrix column by column, each column's error made good by those still to come.

It minimises |(W - Q)X|² for the inputs X of a layer through H = X Xᵀ: where rounding column j leaves the error e_j, the
remaining columns move by -e_j * U_j,rest / U_jj, with U the upper Cholesky factor of H⁻¹. R rows (outputs), C columns
(inputs) of a weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba_lightning.model.hymba import Hymba
from hymba_lightning.model.layers import Linear
from hymba_lightning.model.mixer import HybridMixer
from hymba_lightning.model.roles import Role
from hymba_lightning.ops.threads import spread_torch
from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.rows import (
    QuantizedTensor,
    as_rows,
    check_finite,
    coarsen_rows,
    coarser_scale,
    normalise,
    q_max_of,
    quantize_rows,
    search_scale,
)

log = logging.getLogger("hymba_lightning")


class SingularHessianError(ValueError):
    """The inputs seen in calibration do not determine the rounding."""


def quantize_gptq(
    weight_RC: Tensor,
    hessian_CC: Tensor,
    bits: int,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    clip_quantile: float = 0.999,
    clip_steps: int = 17,
    coarsen: float = 1.0,
    name: str = "tensor",
) -> QuantizedTensor:
    """Rounds `weight` so that its layer's outputs on the calibration inputs change least.

    hessian: sum (or mean) of x xᵀ over inputs x. damping: share of its mean diagonal added to the diagonal. act_order:
    columns of large inputs first, while most others can still make good for them. The clip of each row is searched for
    least squared error weighted by the diagonal. Raises SingularHessianError, or ValueError for inf or NaN in `weight`.
    """
    q_max = q_max_of(bits)
    check_finite(name, weight_RC)
    upper_CC, order_C = inverse_factor(hessian_CC, damping, act_order)
    rows_RC, exponent = normalise(weight_RC.detach(), q_max)
    diagonal_C = hessian_CC.diagonal().to(rows_RC)
    scale_R = coarser_scale(search_scale(rows_RC, q_max, clip_quantile, clip_steps, diagonal_C), coarsen)
    ordered_RC = round_columns(rows_RC[:, order_C], upper_CC.to(rows_RC), scale_R, q_max, block)
    q_RC = torch.empty_like(ordered_RC, dtype=torch.int8)
    q_RC[:, order_C] = ordered_RC.to(torch.int8)
    return QuantizedTensor(q_RC, scale_R.half(), exponent, bits)


def inverse_factor(hessian_CC: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped inverse Hessian in float64, and the order of columns it belongs to.

    A column whose input was always 0 gets the mean diagonal, which leaves it out of all corrections.
    """
    hessian_CC = hessian_CC.double()
    diagonal_C = hessian_CC.diagonal()
    mean = diagonal_C.mean()
    if not torch.isfinite(hessian_CC).all() or not mean > 0:
        raise SingularHessianError("the Hessian is zero, inf or NaN")
    order_C = (
        diagonal_C.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal_C), device=diagonal_C.device)
    )
    filled_CC = hessian_CC + torch.diag(torch.where(diagonal_C > 0, damping * mean, mean))
    # From the last column to the first: H = R Rᵀ with R upper triangular, so H⁻¹ = Uᵀ U with U = R⁻¹.
    backward_C = order_C.flip(0)
    lower_CC, failed = torch.linalg.cholesky_ex(filled_CC[backward_C][:, backward_C])
    if failed:
        raise SingularHessianError("the Hessian is not positive definite")
    upper_CC = inverse_of_lower(lower_CC).flip(0, 1)
    if not torch.isfinite(upper_CC).all():
        raise SingularHessianError("the Hessian's inverse is not finite")
    return upper_CC, order_C


def inverse_of_lower(lower_CC: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: mostly products, where a solve would also work on zeros."""
    if len(lower_CC) <= 128:
        eye_CC = torch.eye(len(lower_CC), dtype=lower_CC.dtype, device=lower_CC.device)
        return torch.linalg.solve_triangular(lower_CC, eye_CC, upper=False)
    half = len(lower_CC) // 2
    inverse_CC = torch.zeros_like(lower_CC)
    first, last = inverse_of_lower(lower_CC[:half, :half]), inverse_of_lower(lower_CC[half:, half:])
    inverse_CC[:half, :half], inverse_CC[half:, half:] = first, last
    inverse_CC[half:, :half] = last @ (lower_CC[half:, :half] @ first).neg_()
    return inverse_CC


def round_columns(rows_RC: Tensor, upper_CC: Tensor, scale_R: Tensor, q_max: int, block: int) -> Tensor:
    """Rounds columns of a float32 matrix from left to right with correction, `block` at a time; q as float32 (R, C).

    Inside a block each column corrects the block's rest at once; the columns beyond it get one matrix product.
    """
    # numba is imported when it is needed, which in a fit is at the end.
    from hymba_lightning.quantization.gptq_loops import round_block

    # A column is a row of memory here. Once it is rounded, its error stands in its place.
    work_CR = rows_RC.T.clone(memory_format=torch.contiguous_format).cpu()
    upper_CC, scale_R = upper_CC.contiguous().cpu(), scale_R.contiguous().cpu()
    q_CR = torch.empty_like(work_CR)
    arrays = [tensor.numpy() for tensor in (work_CR, upper_CC, scale_R, q_CR)]
    columns = len(work_CR)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        round_block(start, end, np.float32(q_max), *arrays)
        work_CR[end:].addmm_(upper_CC[start:end, end:].T, work_CR[start:end], alpha=-1)
    return q_CR.T.to(rows_RC.device)


def collect_hessians(net: Hymba, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sums x xᵀ over the inputs x of every linear of `net`, streamed over `batches` of token ids (B, T).

    Returns {name of the weight: (C, C) float32 on the net's device}; a projection shared by several layers has one
    Hessian, the sum over all its uses, under each of its names. Under DDP each rank gives its share of the batches and
    the sums are added up afterwards.
    """
    sums: dict[int, Tensor] = {}

    def add(linear: Any, x: Tensor) -> None:
        x_NC = x.detach().flatten(0, -2).float()
        if id(linear) not in sums:
            sums[id(linear)] = x_NC.new_zeros(x_NC.shape[1], x_NC.shape[1])
        sums[id(linear)].addmm_(x_NC.T, x_NC)

    def before_mixer(mixer: HybridMixer, arguments: tuple) -> None:
        for linear in mixer.joined():
            add(linear, arguments[0])

    handles = []
    for module in net.modules():
        if isinstance(module, HybridMixer):
            handles.append(module.register_forward_pre_hook(before_mixer))
        elif isinstance(module, Linear):
            handles.append(module.register_forward_pre_hook(lambda linear, arguments: add(linear, arguments[0])))
    try:
        with torch.no_grad():
            for inputs in batches:
                hidden_BTD, _ = net.hidden(inputs)
                if net.lm_head is not None:
                    add(net.lm_head, net.normed(hidden_BTD))
    finally:
        for handle in handles:
            handle.remove()
    return {
        f"{name}.weight": sums[id(module)]
        for name, module in net.named_modules(remove_duplicate=False)
        if id(module) in sums
    }


def quantize_with_hessians(
    state_dict: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantizationConfig,
    roles: Mapping[str, Role],
) -> dict[str, QuantizedTensor]:
    """GPTQ for every matrix that `config` quantizes and that has a Hessian; for `save_artifact(quantized=...)`.

    A matrix whose Hessian is singular is rounded to nearest, with a warning that names it.
    """
    wanted = []
    for name, weight in state_dict.items():
        storage, bits = config.storage_of(name, weight.numel(), roles[name])
        if name in hessians and storage == "int":
            wanted.append((name, weight, hessians[name], bits))
    # Sharers of one weight have one Hessian. Columns are rounded in small steps: a thread a weight, not a step.
    shared = list({id(hessian): item for item in wanted for hessian in [item[2]]}.values())
    done: dict[int, QuantizedTensor] = {}

    def quantize(index: int) -> None:
        name, weight, hessian, bits = shared[index]
        options: dict[str, Any] = {"clip_quantile": config.clip_quantile, "clip_steps": config.clip_steps, "name": name}
        try:
            done[id(hessian)] = quantize_gptq(as_rows(weight), hessian, bits, coarsen=config.coarsen, **options)
        except SingularHessianError as error:
            log.warning("%s is rounded to nearest instead of by GPTQ: %s", name, error)
            done[id(hessian)] = coarsen_rows(weight, quantize_rows(weight, bits, **options), config.coarsen)

    spread_torch(quantize, len(shared))
    return {name: done[id(hessian)] for name, _, hessian, _ in wanted}
