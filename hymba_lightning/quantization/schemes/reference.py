"""The quantizer of the public reference run, bit for bit, its defects kept. R rows, C columns."""

import math

import torch
from torch import Tensor

from hymba_lightning.quantization.config import QuantizationConfig
from hymba_lightning.quantization.rows import QuantizedTensor, as_rows, check_finite, q_max_of, round_to
from hymba_lightning.quantization.schemes import Scheme

# The reference's candidates for its one clip per tensor.
REFERENCE_QUANTILES = (0.999, 0.9995, 0.9999, 0.99995, 0.99999, 0.999999, 1.0)


def quantize_reference(weight: Tensor, bits: int, *, name: str = "tensor") -> QuantizedTensor:
    """The reference's quantizer, defects kept: a float32 scale never below 1/q_max rounds the weights and its float16
    copy is stored; one quantile for all rows of a tensor, the first of least mean squared error.

    weight: (R, C); other shapes are quantized as rows along the last axis. Raises ValueError for inf or NaN.
    """
    q_max = q_max_of(bits)
    check_finite(name, weight)
    rows_RC = as_rows(weight.detach()).float()
    magnitude_RC = rows_RC.abs()
    best_error, best = math.inf, None
    # One call, so that rows are sorted once.
    for clip_R in torch.quantile(magnitude_RC, magnitude_RC.new_tensor(REFERENCE_QUANTILES), dim=1):
        scale_R = (clip_R / q_max).clamp_min(1 / q_max)
        clipped_RC = torch.maximum(torch.minimum(rows_RC, clip_R[:, None]), -clip_R[:, None])
        q_RC = round_to(clipped_RC, scale_R, q_max)
        error = float((rows_RC - q_RC * scale_R[:, None]).square().mean())
        if error < best_error:
            best_error, best = error, (q_RC, scale_R)
    if best is None:
        raise ValueError(f"{name}: its entries are too large to square in float32; use the scheme 'rows'")
    q_RC, scale_R = best
    return QuantizedTensor(q_RC.to(torch.int8), scale_R.half(), 0, bits)


class Reference(Scheme):
    """Each tensor by itself, as the public reference run does: see `quantize_reference`."""

    summary = (
        "the reference's quantizer bit for bit, with its defect 4 (scale floor of 1/q_max whatever the row's size, one "
        "clip quantile per tensor, float16 scales stored but float32 ones rounded with)"
    )
    fits_limit = False

    def round(self, name: str, tensor: Tensor, bits: int, config: QuantizationConfig) -> QuantizedTensor:
        return quantize_reference(tensor, bits, name=name)


SCHEME = Reference()
